"""What calibration measured at the inputs of a group of Linears (a site), as its files hold it.

One safetensors file a layer: `{site}.hessian` float32 [K, K] = Σ a x xᵀ / Σ a, `{site}.abs_mean` float32 [K] = E|x|,
`{site}.tokens` int64 [2] = text and image tokens. `{site}.hessian_diag` [K] may stand for the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vl2.errors import VL2Error
from vl2.model.checkpoint import read_tensor
from vl2.quant.affine import check_finite
from vl2.safetensors_file import TensorEntry, read_header


@dataclass(frozen=True)
class Statistics:
    """`hessian`: E[x xᵀ] float [K, K], or its diagonal [K] where no correlations were measured; `abs_mean`: E|x| float
    [K]; `tokens`: how many x, counted once each."""

    hessian: Tensor
    abs_mean: Tensor
    tokens: int

    @property
    def importance(self) -> Tensor:
        """E[x_k²] [K]: the weight of column k where inputs are uncorrelated."""
        return self.hessian if self.hessian.dim() == 1 else self.hessian.diagonal()

    def scaled_inputs(self, scale: Tensor) -> Statistics:
        """The statistics of x / scale (scale: [K]), which a fold makes the site's new input."""
        inverse = 1 / scale.to(self.hessian.dtype)
        return replace(
            self, hessian=self.hessian * inverse[:, None] * inverse, abs_mean=self.abs_mean * inverse
        )


class LayerStatistics:
    """The sites of one statistics file, read when asked for: 64 experts' Hessians need not be in memory together."""

    def __init__(self, path: Path):
        self.path = path
        self._entries = read_header(path)

    def __contains__(self, site: str) -> bool:
        return f"{site}.tokens" in self._entries

    def tokens(self, name: str) -> int:
        """Text and image tokens that reached the site."""
        return int(self._raw(f"{name}.tokens").sum())

    def site(self, name: str) -> Statistics:
        """Raises VL2Error naming file and tensor on a missing, misshapen or non-finite one.

        A site without tokens is all zeros, whatever the file holds: a mean of nothing may be NaN.
        """
        tokens = self.tokens(name)
        if tokens == 0:
            size = self._entry(f"{name}.abs_mean").shape[0]
            return Statistics(torch.zeros(size, size), torch.zeros(size), 0)
        abs_mean = self._read(f"{name}.abs_mean")
        if f"{name}.hessian" in self._entries:
            hessian = self._read(f"{name}.hessian")
        else:
            hessian = torch.diag(self._read(f"{name}.hessian_diag"))
        size = len(abs_mean)
        if hessian.shape != (size, size):
            raise VL2Error(f"{self.path}: `{name}.hessian` is {list(hessian.shape)}, expected [{size}, {size}]")
        if bool((hessian.diagonal() < 0).any()):
            raise VL2Error(f"{self.path}: `{name}.hessian` has a negative diagonal, no sum of squares has")
        return Statistics(hessian, abs_mean, tokens)

    def with_extra(self, name: str, own: Statistics) -> Statistics:
        """`own`, the statistics of site `name`, joined by those of tokens that nearly went there, if the file has them.

        `{name}.extra` is a site of its own, `{name}.extra.weight` says how many of the expert's tokens it stands for.
        """
        if f"{name}.extra" not in self:
            return own
        extra, weight = self.site(f"{name}.extra"), float(self._read(f"{name}.extra.weight"))
        share = own.tokens / (own.tokens + weight)
        return Statistics(
            torch.lerp(extra.hessian, own.hessian, share),
            torch.lerp(extra.abs_mean, own.abs_mean, share),
            own.tokens + int(weight),
        )

    def _read(self, name: str) -> Tensor:
        return read_tensor(self._entry(name)).float()

    def _raw(self, name: str) -> Tensor:
        entry = self._entry(name)
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            return torch.frombuffer(bytearray(file.read(entry.size_bytes)), dtype=torch.int64)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise VL2Error(f"{self.path} lacks `{name}`", "calibrate this checkpoint again: the file is of another one")
        return self._entries[name]


def check_statistics(statistics: Statistics, inputs: int) -> None:
    """Raises VL2Error unless the statistics are finite and of a matrix with K = `inputs`."""
    check_finite(statistics.hessian, "a Hessian")
    if set(statistics.hessian.shape) != {inputs}:
        raise VL2Error(
            f"a Hessian is {list(statistics.hessian.shape)}, but its matrix has {inputs} inputs",
            "the statistics are of another checkpoint: calibrate again",
        )

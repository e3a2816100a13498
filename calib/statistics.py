"""What quantization needs to know of the inputs of a Linear: second moments, mean magnitudes, counts.

Second moments are summed in float32, in place: the dense layer of the published Base has 12,288 inputs, so its matrix
alone takes 0.6 GB. Their relative error stays near 1e-6; one-dimensional sums are kept in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vl2.errors import VL2Error

TEXT, IMAGE = 0, 1
ROWS_AT_ONCE = 2048
BALANCES = ("modality", "none")
TOKEN_WEIGHTS = ("uniform", "router")


@dataclass(frozen=True)
class StatisticsOptions:
    """How tokens count in `hessian` and `abs_mean` (quantization guide, section 1.8).

    balance: "modality" gives text and image tokens half of the total weight each, "none" every token the same;
    token_weight: "router" multiplies an expert's tokens by the square of their routing weight.
    """

    balance: str = "modality"
    token_weight: str = "uniform"

    def __post_init__(self) -> None:
        if self.balance not in BALANCES:
            raise VL2Error(f"balance is {self.balance!r}, expected one of {', '.join(BALANCES)}")
        if self.token_weight not in TOKEN_WEIGHTS:
            raise VL2Error(f"token_weight is {self.token_weight!r}, expected one of {', '.join(TOKEN_WEIGHTS)}")


@dataclass
class SiteSum:
    """Σ a x xᵀ (float32) and Σ a |x| over the tokens that reach one site, Σ a, and the tokens of each modality."""

    outer: Tensor
    magnitude: Tensor
    weight: float
    tokens: Tensor

    @staticmethod
    def empty(size: int) -> SiteSum:
        return SiteSum(torch.zeros(size, size), torch.zeros(size, dtype=torch.float64), 0.0,
                       torch.zeros(2, dtype=torch.int64))

    def add(self, x: Tensor, modality: Tensor, weight: Tensor) -> None:
        """x: [n, K] float32; modality: uint8 [n]; weight: float32 [n], a_t of each token, not negative."""
        for rows, kinds, a in zip(x.split(ROWS_AT_ONCE), modality.split(ROWS_AT_ONCE), weight.split(ROWS_AT_ONCE),
                                  strict=True):
            scaled = rows * a.sqrt()[:, None]
            self.outer.addmm_(scaled.T, scaled)
            self.magnitude += a @ rows.abs()
            self.weight += float(a.sum(dtype=torch.float64))
            self.tokens += torch.bincount(kinds.int(), minlength=2)

    def tensors(self, site: str) -> dict[str, Tensor]:
        """`{site}.hessian` [K, K] = Σ a x xᵀ / Σ a and `{site}.abs_mean` [K] float32, `{site}.tokens` int64 [2].

        All zero where no token came. Ends the summing: the matrix is scaled in place, for it may be large.
        """
        scale = 1 / self.weight if self.weight > 0 else 0.0
        return {f"{site}.hessian": self.outer.mul_(scale), f"{site}.abs_mean": (self.magnitude * scale).float(),
                f"{site}.tokens": self.tokens}

    @staticmethod
    def shapes(site: str, size: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of what `tensors` gives for K = size, in its order."""
        return {f"{site}.hessian": (torch.float32, (size, size)), f"{site}.abs_mean": (torch.float32, (size,)),
                f"{site}.tokens": (torch.int64, (2,))}


@dataclass
class Moments:
    """Σ x², Σ |x| [K] and the count of rows: enough for scales, without a K × K product."""

    square: Tensor
    magnitude: Tensor
    count: int

    @staticmethod
    def empty(size: int) -> Moments:
        return Moments(torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 0)

    def add(self, x: Tensor) -> None:
        """x: [n, K] float32."""
        for rows in x.split(ROWS_AT_ONCE):
            self.square += rows.square().sum(dim=0)
            self.magnitude += rows.abs().sum(dim=0)
            self.count += len(rows)

    def __iadd__(self, other: Moments) -> Moments:
        self.square += other.square
        self.magnitude += other.magnitude
        self.count += other.count
        return self

    def tensors(self, site: str) -> dict[str, Tensor]:
        """`{site}.hessian_diag` and `{site}.abs_mean` float32 [K], `{site}.tokens` int64 [2], all tokens image."""
        count = max(self.count, 1)
        return {f"{site}.hessian_diag": (self.square / count).float(),
                f"{site}.abs_mean": (self.magnitude / count).float(), f"{site}.tokens": torch.tensor([0, self.count])}


def token_weights(modality: Tensor, options: StatisticsOptions) -> Tensor:
    """a_t of each token, float32 [tokens], 1 on average. modality: uint8 [tokens] of the whole calibration set.

    Balance is one factor a modality for the whole set, not one for each expert: an expert that saw a single text token
    among many image tokens would otherwise be fitted to that token.
    """
    counts = torch.bincount(modality.int(), minlength=2)
    if options.balance == "none" or not bool(counts.all()):
        return torch.ones(len(modality))
    return (len(modality) / (2 * counts.double())).float()[modality.int()]


def modality_weights(modality: Tensor, weight: Tensor) -> list[float]:
    """a_t of a text and of an image token, 0 for a modality that does not occur."""
    return [float(weight[modality == kind][:1].sum()) for kind in (TEXT, IMAGE)]


@contextmanager
def record_inputs(linears: Mapping[str, tuple[nn.Module, Callable[[Tensor], None]]]) -> Iterator[None]:
    """While open, each function gets the input of its module at every call."""
    hooks = [module.register_forward_pre_hook(lambda _, inputs, record=record: record(inputs[0]))
             for module, record in linears.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

"""Accept-if-better: of several quantizations of a matrix the one with the least output error, rounding among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vl2.quant.affine import Quantized
from vl2.quant.objective import output_energy, output_error


@dataclass(frozen=True)
class Choice:
    """The accepted quantization, its method's name and its output error; rounding's error and the output's energy."""

    quantized: Quantized
    method: str
    error: float
    rtn_error: float
    energy: float

    @property
    def relative_error(self) -> float:
        return self.error / self.energy if self.energy > 0 else 0.0

    @property
    def over_rtn(self) -> float:
        return self.error / self.rtn_error if self.rtn_error > 0 else 1.0


def choose(weight: Tensor, candidates: Mapping[str, Quantized], hessian: Tensor | None) -> Choice:
    """The candidate with the least tr(D H Dᵀ); the first of equals.

    weight: [N, K] float32; candidates: by method, "rtn" among them, so that the result is never worse than rounding on
    this Hessian.
    """
    errors = {name: output_error(weight, made.dequantize(), hessian) for name, made in candidates.items()}
    best = min(errors, key=errors.__getitem__)
    return Choice(candidates[best], best, errors[best], errors["rtn"], output_energy(weight, hessian))


def join_rows(choices: Sequence[Choice]) -> Choice:
    """The choices of a matrix's rows as one; its method is the one that most of them took."""
    if len(choices) == 1:
        return choices[0]
    parts = [choice.quantized for choice in choices]
    codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
    (method, _), = Counter(choice.method for choice in choices).most_common(1)
    sums = (sum(getattr(choice, name) for choice in choices) for name in ("error", "rtn_error", "energy"))
    return Choice(Quantized(codes, scales, parts[0].bits), method, *sums)

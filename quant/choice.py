"""Accept-if-better: of several quantizations of a matrix the one with the least output error, rounding among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vl2.quant.affine import Quantized
from vl2.quant.objective import output_error, relative_error


@dataclass(frozen=True)
class Choice:
    """The accepted quantization, its method's name, its relative error and its error over rounding's."""

    quantized: Quantized
    method: str
    relative_error: float
    over_rtn: float


def choose(weight: Tensor, candidates: Mapping[str, Quantized], hessian: Tensor | None) -> Choice:
    """The candidate with the least tr(D H Dᵀ); the first of equals.

    weight: [N, K] float32; candidates: by method, "rtn" among them, so that the result is never worse than rounding on
    this Hessian.
    """
    errors = {name: output_error(weight, made.dequantize(), hessian) for name, made in candidates.items()}
    best = min(errors, key=errors.__getitem__)
    baseline = errors["rtn"]
    return Choice(
        candidates[best],
        best,
        relative_error(weight, candidates[best].dequantize(), hessian),
        errors[best] / baseline if baseline > 0 else 1.0,
    )

"""GPTQ: each column's rounding error is made up for by the columns not yet rounded (2210.17323, algorithm 1).

Scales are fixed before the loop ("static groups"), so that columns may be taken in order of importance and no index of
the order is stored. Where the input of a column was never seen (a dead column), the column is rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vl2.quant.affine import Quantized, absmax_scales
from vl2.quant.imatrix import search_scales
from vl2.quant.scheme import Scheme
from vl2.quant.statistics import Statistics, check_statistics

DAMPING = 0.05  # of the mean diagonal; with little damping GPTQ follows noise (guide, 6.2 to 6.4)


@dataclass(frozen=True)
class Factor:
    """What the loop needs of a Hessian, shared by all matrices of a site.

    order: [K] int64, the columns by falling importance; upper: [K, K], U with H⁻¹ = Uᵀ U for the ordered H.
    """

    order: Tensor
    upper: Tensor


def gptq(weight: Tensor, statistics: Statistics, scheme: Scheme, searched: bool = True) -> Quantized:
    """weight: [N, K] float; the Hessian as it is to be used (blended by the caller).

    `searched`: scales from `search_scales`, else absmax. Where the Hessian cannot be factored at any damping, the
    codes are those of rounding with these scales.
    """
    check_statistics(statistics, weight.shape[1])
    if searched:
        scales = search_scales(weight, statistics.importance, scheme)
    else:
        scales = absmax_scales(weight, scheme.group_for(weight.shape[1]), scheme.bits)
    factor = factorize(statistics.hessian) or factorize(torch.diag(statistics.importance))
    assert factor is not None, "a diagonal with damping has a Cholesky factor"
    return Quantized(gptq_codes(weight, scales, scheme.bits, factor), scales, scheme.bits)


def factorize(hessian: Tensor, damping: float = DAMPING) -> Factor | None:
    """The factor of H [K, K] + damping · mean(diag H), in H's dtype; the damping is raised fourfold up to 1 on failure.

    None where even that fails: the caller then has to do with the diagonal.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    while damping <= 1:
        upper = _factor_of_inverse(hessian, order, damping)
        if upper is not None:
            return Factor(order, upper)
        damping *= 4
    return None


def _factor_of_inverse(hessian: Tensor, order: Tensor, damping: float) -> Tensor | None:
    """U with M⁻¹ = Uᵀ U for the ordered and damped Hessian M; None where there is none.

    One of the dense layer takes 0.2 GB (Tiny): none is kept longer than it is needed.
    """
    damped = _damped(hessian, order, damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed or not bool(upper.isfinite().all()) else upper


def _damped(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """H [K, K] ordered, over its mean diagonal, with `damping` on the diagonal; 1 + damping for dead columns."""
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    alive_mean = diagonal[~dead].mean() if bool((~dead).any()) else diagonal.new_ones(())
    damped = hessian[order][:, order].div_(alive_mean)
    damped.diagonal()[dead[order]] = 1.0
    damped.diagonal().add_(damping)
    return damped


def gptq_codes(weight: Tensor, scales: Tensor, bits: int, factor: Factor, block: int = 128) -> Tensor:
    """Codes int8 [N, K] for weight [N, K] and fixed scales float16 [N, G]; computed in the factor's dtype.

    `block` columns are finished before their errors reach the columns behind them; it changes the speed only.
    """
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    upper, columns = factor.upper, weight.shape[1]
    group = columns // scales.shape[1]
    order, diagonal = factor.order.tolist(), upper.diagonal().tolist()  # looking into tensors costs as much as a column
    steps = scales.T.to(upper.dtype).contiguous()
    # transposed, so that a column is contiguous
    left = weight.T[factor.order].to(upper.dtype).contiguous()
    codes = torch.empty(columns, weight.shape[0], dtype=torch.int8)
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        errors = torch.empty(end - begin, weight.shape[0], dtype=upper.dtype)
        for i in range(begin, end):
            step = steps[order[i] // group]
            code = (left[i] / step).round_().clamp_(low, high)
            codes[order[i]] = code.to(torch.int8)
            error = (left[i] - code * step) / diagonal[i]
            left[i + 1 : end].addr_(upper[i, i + 1 : end], error, alpha=-1)
            errors[i - begin] = error
        left[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    return codes.T.contiguous()

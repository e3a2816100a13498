"""What a quantized matrix costs: the error of its output on calibration inputs, from their second moments alone."""

from __future__ import annotations

import math

from torch import Tensor


def output_errors(weight: Tensor, approximation: Tensor, hessian: Tensor | None) -> Tensor:
    """[N], of each output E(ŵx − wx)² = d H dᵀ with d a row of D = Ŵ − W [N, K] and H = E[x xᵀ] [K, K]; Σ d² where H is
    None (no statistics).

    Of H [K], a diagonal alone, it is the error of uncorrelated inputs. Optimal Brain Compression, equation 2
    (2208.11580).
    """
    difference = approximation - weight
    weighted = difference
    if hessian is not None:
        hessian = hessian.to(difference.dtype)
        weighted = difference * hessian if hessian.dim() == 1 else difference @ hessian
    return (weighted * difference).sum(dim=1)


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor | None) -> float:
    """E‖Ŵx − Wx‖² = tr(D H Dᵀ), the sum of `output_errors`."""
    return total(output_errors(weight, approximation, hessian))


def output_energies(weight: Tensor, hessian: Tensor | None) -> Tensor:
    """[N], E(wx)² of each output: what `output_errors` are measured against."""
    return output_errors(weight, weight.new_zeros(()).expand_as(weight), hessian)


def relative_error(weight: Tensor, approximation: Tensor, hessian: Tensor | None) -> float:
    """`output_error` over the energy of the exact output; 0 where that is 0."""
    return ratio(output_errors(weight, approximation, hessian), output_energies(weight, hessian))


def ratio(errors: Tensor, energies: Tensor) -> float:
    """Of the sums of outputs' errors [N] and energies [N]; 0 without energy."""
    energy = total(energies)
    return total(errors) / energy if energy > 0 else 0.0


def total(errors: Tensor) -> float:
    """The sum of `output_errors`, which rounding may leave a little below 0."""
    return float(errors.sum().clamp(min=0))


def signal_to_noise_db(relative: float) -> float:
    """SQNR in decibels of a `relative_error`; infinity for an exact copy."""
    return -10 * math.log10(relative) if relative > 0 else math.inf

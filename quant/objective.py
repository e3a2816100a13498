"""What a quantized matrix costs: the error of its output on calibration inputs, from their second moments alone."""

from __future__ import annotations

import math

from torch import Tensor


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor | None) -> float:
    """E‖Ŵx − Wx‖² = tr(D H Dᵀ) with D = Ŵ − W [N, K] and H = E[x xᵀ] [K, K]; Σ D² where H is None (no statistics).

    Of H [K], a diagonal alone, it is the error of uncorrelated inputs. Optimal Brain Compression, equation 2
    (2208.11580).
    """
    difference = approximation - weight
    weighted = difference
    if hessian is not None:
        hessian = hessian.to(difference.dtype)
        weighted = difference * hessian if hessian.dim() == 1 else difference @ hessian
    return float((weighted * difference).sum().clamp(min=0))


def output_energy(weight: Tensor, hessian: Tensor | None) -> float:
    """E‖Wx‖², what `output_error` is measured against."""
    return output_error(weight, weight.new_zeros(()).expand_as(weight), hessian)


def relative_error(weight: Tensor, approximation: Tensor, hessian: Tensor | None) -> float:
    """`output_error` over the energy of the exact output; 0 where that is 0."""
    energy = output_energy(weight, hessian)
    return output_error(weight, approximation, hessian) / energy if energy > 0 else 0.0


def signal_to_noise_db(relative: float) -> float:
    """SQNR in decibels of a `relative_error`; infinity for an exact copy."""
    return -10 * math.log10(relative) if relative > 0 else math.inf

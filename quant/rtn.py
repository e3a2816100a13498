"""Round to nearest: the baseline that every other method must beat."""

from __future__ import annotations

from torch import Tensor

from vl2.quant.affine import Quantized, absmax_scales, quantize
from vl2.quant.scheme import Scheme
from vl2.quant.statistics import Statistics


def rtn(weight: Tensor, statistics: Statistics | None, scheme: Scheme) -> Quantized:
    """weight: [N, K] float. The statistics have no part in it."""
    scales = absmax_scales(weight, scheme.group_for(weight.shape[1]), scheme.bits)
    return Quantized(quantize(weight, scales, scheme.bits), scales, scheme.bits)

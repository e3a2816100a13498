"""The grid: scales from a weight, codes from scales, and back. Ŵ = codes · scale; nothing else defines a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vl2.errors import VL2Error

# TensorRT wants scales > 0, and consumers that flush subnormals would read a smaller one as 0.
SMALLEST_SCALE = torch.finfo(torch.float16).smallest_normal
_LARGEST_SCALE = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Quantized:
    """One matrix: codes int8 [N, K] in the range of `bits`, scales float16 [N, K / group_size], all normal and > 0."""

    codes: Tensor
    scales: Tensor
    bits: int

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        return dequantize(self.codes, self.scales)


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises VL2Error naming `what` on a NaN or infinity."""
    low, high = tensor.aminmax()
    if not bool(low.isfinite() & high.isfinite()):
        raise VL2Error(f"{what} holds NaN or infinity", "the source is damaged, or a computation before it overflowed")


def absmax_scales(weight: Tensor, group_size: int, bits: int) -> Tensor:
    """Scales that make the largest weight of a group fall half a step beyond the largest code: absmax / (2^b − 1) · 2.

    weight: [N, K] float; returns float16 [N, K / group_size], rounded up, so that no weight is more than half a step
    from its code. A group of zeros gets 1. Raises VL2Error on NaN, infinity and scales beyond float16. The rule is
    compressed-tensors' (absmax / 7.5 for four bits).
    """
    check_finite(weight, "the weight")
    largest = weight.float().abs().unflatten(1, (-1, group_size)).amax(dim=-1)
    return _storable(largest * (2 / ((1 << bits) - 1)), up=True)


def shrink_scales(scales: Tensor, factor: float) -> Tensor:
    """`scales` float16 [N, G] times a factor < 1, rounded to storable float16."""
    return _storable(scales.float() * factor, up=False)


def quantize(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest codes, int8 [N, K], for a float weight [N, K] and float16 scales [N, G]; ties go to the even code."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    grouped = weight.float().unflatten(1, (scales.shape[1], -1))
    return (grouped / scales.float()[..., None]).round_().clamp_(low, high).to(torch.int8).flatten(1)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [N, K] from int8 codes [N, K] and float16 scales [N, G]; exact, as 8 + 11 bits fit into 24."""
    return (codes.unflatten(1, (scales.shape[1], -1)) * scales.float()[..., None]).flatten(1)


def _storable(scales: Tensor, up: bool) -> Tensor:
    """float32 scales as float16 ≥ SMALLEST_SCALE; 0 becomes 1, since a group of zeros needs some scale."""
    if float(scales.max()) > _LARGEST_SCALE:
        raise VL2Error(
            f"a scale of {float(scales.max()):g} is beyond float16", "keep this matrix unquantized with the recipe"
        )
    stored = scales.half()
    if up:
        # positive floats are ordered as their bit patterns
        stored = torch.where(stored.float() < scales, (stored.view(torch.int16) + 1).view(torch.float16), stored)
    return torch.where(scales == 0, 1.0, stored.float().clamp(min=SMALLEST_SCALE)).half()

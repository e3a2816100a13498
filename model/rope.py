"""Rotary position embedding: tables and rotation (specification 8.1).

Tables are computed in float32 from the positions at every call. Nothing is stored, so converting a model to bfloat16
cannot round the frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vl2.config import LanguageConfig, RopeScaling


def rope_tables(config: LanguageConfig, position_ids: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 [B, T, d] with the d/2 angles twice.

    position_ids: [B, T] int64. total: keys in sight; only dynamic scaling reads it. With that, keys cached at a shorter
    length keep their angles, as in the original, so decoding beyond the limit is not one long prefill.
    """
    d = config.qk_rope_head_dim if config.use_mla else config.head_dim
    inv_freq = inverse_frequencies(config, d, total, position_ids.device)
    positions = position_ids.to(torch.float32)
    if config.rope_scaling is not None and config.rope_scaling.type == "linear":
        positions = positions / config.rope_scaling.factor
    angles = positions[..., None] * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    scale = table_scale(config.rope_scaling)
    return angles.cos() * scale, angles.sin() * scale


def inverse_frequencies(config: LanguageConfig, d: int, total: int, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of each pair, float32 [d/2]; linear scaling divides the positions instead."""
    scaling = config.rope_scaling
    theta = config.rope_theta
    if scaling is not None and scaling.type == "dynamic" and total > config.max_position_embeddings:
        stretch = scaling.factor * total / config.max_position_embeddings - (scaling.factor - 1)
        theta = theta * stretch ** (d / (d - 2))
    inv_freq = 1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)
    if scaling is not None and scaling.type == "yarn":
        ramp = _yarn_ramp(scaling, d, config.rope_theta, device)
        return inv_freq / scaling.factor * ramp + inv_freq * (1 - ramp)
    return inv_freq


def _yarn_ramp(scaling: RopeScaling, d: int, theta: float, device: torch.device | str) -> Tensor:
    """0 where a pair turns fast enough to keep its frequency, 1 where it is fully interpolated; float32 [d/2]."""

    def pair_of(rotations: float) -> float:
        context = scaling.original_max_position_embeddings
        return d * math.log(context / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high: float = min(math.ceil(pair_of(scaling.beta_slow)), d - 1)
    if high == low:
        high += 0.001
    return ((torch.arange(d // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)


def _yarn_mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def table_scale(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied by; 1 but for yarn."""
    if scaling is None or scaling.type != "yarn":
        return 1.0
    return _yarn_mscale(scaling.factor, scaling.mscale) / _yarn_mscale(scaling.factor, scaling.mscale_all_dim)


def latent_softmax_scale(config: LanguageConfig) -> float:
    """(nope + rope)^−½, times yarn's squared magnitude where it is set."""
    scale = config.head_dim**-0.5
    scaling = config.rope_scaling
    if scaling is None or scaling.type != "yarn" or not scaling.mscale_all_dim:
        return scale
    return scale * _yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [B, T, heads, d]; element i pairs with i + d/2. cos, sin: [B, T, d], rounded to x's dtype first."""
    cos, sin = cos.to(x.dtype)[:, :, None], sin.to(x.dtype)[:, :, None]
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def deinterleave(x: Tensor) -> Tensor:
    """[x₀, x₁, x₂, …] to [x₀, x₂, …, x₁, x₃, …]: latent attention's weights give pairs (2i, 2i + 1)."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

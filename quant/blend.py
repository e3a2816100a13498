"""Hessians of experts, made safe for the few tokens that some of them get.

With fewer tokens than inputs an expert's own Hessian is mostly noise, and GPTQ on it is worse than rounding. Mixed with
the layer's it serves at any number of tokens (guide, 6.3); at the down projection the experts have no common basis, so
there the diagonal takes the layer's place (guide, 6.4).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vl2.quant.statistics import Statistics

# Activations behind SwiGLU are heavy-tailed: their correlations need many more tokens than their sizes do.
DOWN_TOKENS = 16


def blend_with_layer(expert: Statistics, layer: Statistics) -> Statistics:
    """w · H_e + (1 − w) · H_layer with w = T / (T + K); both at the same input. With T = 0 it is the layer's."""
    share = expert.tokens / (expert.tokens + len(layer.abs_mean))
    return Statistics(
        _mix(expert.hessian, layer.hessian, share), _mix(expert.abs_mean, layer.abs_mean, share), expert.tokens
    )


def shrink_to_diagonal(statistics: Statistics, strength: float = 1.0) -> Statistics:
    """w · H + (1 − w) · diag(H) with w = T / (T + strength · K).

    `strength`: DOWN_TOKENS behind SwiGLU, 1 elsewhere. Without any token it is the identity: every input counts the
    same.
    """
    size = len(statistics.abs_mean)
    if statistics.tokens == 0 or not bool(statistics.importance.any()):
        return Statistics(torch.eye(size), torch.ones(size), statistics.tokens)
    hessian = statistics.hessian * (statistics.tokens / (statistics.tokens + strength * size))
    hessian.diagonal().copy_(statistics.importance)
    return replace(statistics, hessian=hessian)


def _mix(own: Tensor, other: Tensor, share: float) -> Tensor:
    # an expert without tokens may hold anything, even NaN from 0 / 0
    return other if share == 0 else torch.lerp(other, own, share)

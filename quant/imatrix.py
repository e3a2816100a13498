"""Rounding with searched scales: the step that loses least where the inputs are large ("importance matrix").

Clipping the largest weights of a group buys a finer step for the rest. llama.cpp's imatrix and llm-compressor's
`imatrix_mse` observer do the same; with p = 2 the loss is the output error of uncorrelated inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vl2.quant.affine import Quantized, absmax_scales, quantize, shrink_scales
from vl2.quant.scheme import Scheme
from vl2.quant.statistics import Statistics, check_statistics

_FACTORS = torch.linspace(1.0, 0.65, 21).tolist()
_CHUNK_ELEMENTS = 1 << 17  # what a core's cache holds a few copies of


def imatrix(weight: Tensor, statistics: Statistics | None, scheme: Scheme) -> Quantized:
    """weight: [N, K] float. Without statistics every input counts the same (plain squared error)."""
    importance = None
    if statistics is not None:
        check_statistics(statistics, weight.shape[1])
        importance = statistics.importance
    scales = search_scales(weight, importance, scheme)
    return Quantized(quantize(weight, scales, scheme.bits), scales, scheme.bits)


def search_scales(weight: Tensor, importance: Tensor | None, scheme: Scheme) -> Tensor:
    """Scales float16 [N, G] that lose least in Σ_k importance_k (ŵ_k − w_k)² per group, of 21 clippings down to 0.65.

    weight: [N, K] float; importance: [K] ≥ 0 or None. Where nothing is better, the absmax scale stays, so the loss is
    never above rounding's.
    """
    columns = weight.shape[1]
    group = scheme.group_for(columns)
    importance = None if importance is None else importance.float().view(-1, group)
    rows = max(1, _CHUNK_ELEMENTS // columns)
    return torch.cat([_search(chunk, importance, group, scheme) for chunk in weight.float().split(rows)])


def _search(weight: Tensor, importance: Tensor | None, group: int, scheme: Scheme) -> Tensor:
    start = absmax_scales(weight, group, scheme.bits)
    grouped = weight.unflatten(1, (-1, group))
    best, least = start, _losses(grouped, start, importance, scheme)
    for factor in _FACTORS[1:]:
        scales = shrink_scales(start, factor)
        losses = _losses(grouped, scales, importance, scheme)
        better = losses < least
        best, least = torch.where(better, scales, best), torch.where(better, losses, least)
    return best


def _losses(grouped: Tensor, scales: Tensor, importance: Tensor | None, scheme: Scheme) -> Tensor:
    """[N, G] losses of grouped weights [N, G, group]."""
    steps = grouped / scales.float()[..., None]
    squares = steps.round().clamp_(*scheme.code_range).sub_(steps).square_()
    if importance is not None:
        squares.mul_(importance)
    return squares.sum(dim=-1) * scales.float().square()

"""AWQ's scales taken out of a quantized layer, so that its matrices can be held against the original's.

A fold divides what feeds a matrix by s and multiplies the matrix's columns by s: the layer is the same, its matrices
are not. Norms are stored in float32, so γ / γ̂ gives their scales back. The scales of rows (up → down, v → o) are not
stored; each is estimated by least squares from the quantized rows. Whatever is estimated goes out of one matrix and
into the other, so their product stays what the file has; an estimate off by δ moves an error of δ² from one to the
other, about 1/K of the rows' own (one number fitted to K).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vl2.layerwise.checkpoints import Pair
from vl2.quant.sites import Site, Unit, layer_units, router_of
from vl2.quantization import WEIGHT

BIAS = ".bias"


@dataclass
class Unfolded:
    """Tensors of a quantized part without the folds' scales, by the checkpoint's names, float32; norms: those whose
    scale was taken out, which say nothing by themselves."""

    tensors: dict[str, Tensor]
    norms: set[str] = field(default_factory=set)


def unfold_layer(pair: Pair, l: int, stage: str, tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
                 ) -> Unfolded:
    """`tensors`: of a layer's part, the reference's and the quantized one's, all of "attention" or some of "mlp".

    A unit (an expert, say) takes part if all its matrices are given; the router if it is given with its norm.
    """
    reference, stored = tensors
    result = Unfolded(dict(stored))
    if not pair.folded:
        return result
    config = pair.config.language_config
    for unit in layer_units(config, l, stage):
        if all(module + WEIGHT in stored for module in unit.modules):
            _unfold_unit(pair, unit, reference, result)
    router = router_of(config, l, stage)
    if router is not None and router + WEIGHT in stored:
        norm = f"language.model.layers.{l}.post_attention_layernorm"
        _divide_columns(result, router, _norm_scale(reference, stored, norm))
        result.norms.add(norm + WEIGHT)
    return result


def _unfold_unit(pair: Pair, unit: Unit, reference: Mapping[str, Tensor], result: Unfolded) -> None:
    for site in unit.sites:
        if site.norm is not None:
            scale = _norm_scale(reference, result.tensors, site.norm)
            for module in site.consumers:
                _divide_columns(result, module, scale)
            result.norms.add(site.norm + WEIGHT)
        elif site.row_source is not None and _all_packed(pair, site):
            _unfold_rows(site, reference, result)


def _norm_scale(reference: Mapping[str, Tensor], stored: Mapping[str, Tensor], norm: str) -> Tensor:
    """float32 [K]: γ / γ̂; 1 where γ is 0 and the channel carries nothing."""
    gamma, divided = reference[norm + WEIGHT], stored[norm + WEIGHT]
    return torch.where((gamma != 0) & (divided != 0), gamma / divided, 1.0)


def _divide_columns(result: Unfolded, module: str, scale: Tensor) -> None:
    name = module + WEIGHT
    result.tensors[name] = result.tensors[name] / scale


def _all_packed(pair: Pair, site: Site) -> bool:
    return all(module in pair.quantized.forms for module in (*site.consumers, site.row_source))


def _unfold_rows(site: Site, reference: Mapping[str, Tensor], result: Unfolded) -> None:
    name, rows = site.row_source + WEIGHT, slice(None) if site.rows is None else site.rows
    original, divided = reference[name][rows], result.tensors[name][rows]
    along = (original * divided).sum(dim=1)
    scale = torch.where(along > 0, original.square().sum(dim=1) / along, 1.0)
    for tensor in (name, site.row_source + BIAS):
        if tensor in result.tensors:
            whole = result.tensors[tensor].clone()
            whole[rows] *= scale.view(-1, *[1] * (whole.dim() - 1))
            result.tensors[tensor] = whole
    for module in site.consumers:
        _divide_columns(result, module, scale)

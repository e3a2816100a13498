"""AWQ's scales of a layer's stage: searched site by site, applied to weights, norms and router. See `sites`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vl2.quant.awq import Consumer, search_scale
from vl2.quant.blend import DOWN_TOKENS, blend_with_layer, shrink_to_diagonal
from vl2.quant.linears import WEIGHT
from vl2.quant.method import Method
from vl2.quant.scheme import Scheme
from vl2.quant.sites import Site, Unit
from vl2.quant.source import Source
from vl2.quant.statistics import LayerStatistics, Statistics
from vl2.quant.tower import TowerStatistics

# A layer's 64 experts share one scale; a sample of them finds it in a quarter of the time.
_BUSIEST, _SPREAD = 8, 8
_LAYER_INPUT = "mlp.input"


@dataclass(frozen=True)
class Stage:
    """What a stage is quantized from: the checkpoint, what was measured (or None), the schemes and the method."""

    source: Source
    statistics: LayerStatistics | TowerStatistics | None
    schemes: Mapping[str, Scheme | None]
    method: Method

    def regularised(self, site: Site) -> Statistics:
        """The site's statistics as methods may trust them (`blend`)."""
        raw = self.statistics.site(site.name)
        if site.kind == "expert":
            return blend_with_layer(raw, self._layer_input)
        if site.kind == "down":
            return shrink_to_diagonal(self.statistics.with_extra(site.name, raw), DOWN_TOKENS)
        return shrink_to_diagonal(raw)

    @cached_property
    def _layer_input(self) -> Statistics:
        return shrink_to_diagonal(self.statistics.site(_LAYER_INPUT))


def search_norm_scales(stage: Stage, units: list[Unit]) -> dict[str, Tensor]:
    """For each norm of the stage the scale [K] that its consumers' inputs are divided by.

    A norm is left out where a consumer is kept unquantized: scaled, it would have to be stored anew in float32.
    """
    by_norm: dict[str, list[Site]] = {}
    for unit in units:
        for site in unit.sites:
            if site.norm is not None:
                by_norm.setdefault(site.norm, []).append(site)
    scales = {}
    for norm, sites in by_norm.items():
        if all(stage.schemes[module] is not None for site in sites for module in site.consumers):
            name = _LAYER_INPUT if sites[-1].kind == "expert" else sites[0].name
            inputs = stage.statistics.site(name)
            consumers = [one for site in _sample(stage, sites) for one in _consumers(stage, site, inputs.tokens)]
            scales[norm] = search_scale(consumers, inputs, stage.method)
    return scales


def fold_norms(stage: Stage, norm_scales: Mapping[str, Tensor], router: str | None) -> dict[str, Tensor]:
    """The norms' weights [K] divided by their scales, and the router's [E, K] multiplied, by tensor name.

    float32 even if the file has less: choices of experts must not change. A layer's mlp has one norm.
    """
    folded = {}
    for norm, scale in norm_scales.items():
        folded[norm + WEIGHT] = _rows_divided(stage.source.tensor(norm + WEIGHT), scale, slice(None))
        if router is not None:
            weight = stage.source.tensor(router + WEIGHT)
            folded[router + WEIGHT] = _columns_multiplied(_at_least_float32(weight), scale)
    return folded


def fold_unit(
    stage: Stage, unit: Unit, weights: dict[str, Tensor], norm_scales: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Applies the unit's scales to `weights` (module → [N, K]), in place of its entries.

    norm_scales: by norm, as `search_norm_scales` gives them; the other sites' are searched here. Returns the scales by
    site, and by tensor name the biases of rows that were divided (float32).
    """
    scales, biases = {}, {}
    for site in unit.sites:
        scale = norm_scales.get(site.norm) if site.norm else _search_row_scale(stage, site, weights)
        if scale is None:
            continue
        scales[site.name] = scale
        for module in site.consumers:
            weights[module] = _columns_multiplied(weights[module], scale)
        if site.row_source is not None:
            rows = slice(None) if site.rows is None else site.rows
            weights[site.row_source] = _rows_divided(weights[site.row_source], scale, rows)
            bias = f"{site.row_source}.bias"
            if bias in stage.source.entries:
                biases[bias] = _rows_divided(stage.source.tensor(bias), scale, rows)
    return scales, biases


def _search_row_scale(stage: Stage, site: Site, weights: Mapping[str, Tensor]) -> Tensor | None:
    """The scale of a site whose producer is rows of another matrix, None where it has none or one of them is kept."""
    modules = (*site.consumers, site.row_source)
    if site.row_source is None or any(stage.schemes[module] is None for module in modules):
        return None
    statistics = stage.regularised(site)
    consumers = [Consumer(weights[module], statistics, stage.schemes[module]) for module in site.consumers]
    return search_scale(consumers, statistics, stage.method)


def _rows_divided(tensor: Tensor, scale: Tensor, rows: slice | Tensor) -> Tensor:
    divided = _at_least_float32(tensor).double()
    divided[rows] = divided[rows] / scale.double().view(-1, *[1] * (tensor.dim() - 1))
    return divided.to(_at_least_float32(tensor).dtype)


def _columns_multiplied(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.double() * scale.double()).to(weight.dtype)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sample(stage: Stage, sites: list[Site]) -> list[Site]:
    """All sites but the experts', the experts with most tokens, and some evenly spread over the others."""
    experts = [site for site in sites if site.kind == "expert"]
    by_tokens = sorted(experts, key=lambda site: -stage.statistics.tokens(site.name))
    others = by_tokens[_BUSIEST:]
    spread = others[:: max(1, len(others) // _SPREAD)][:_SPREAD]
    return [site for site in sites if site.kind != "expert"] + by_tokens[:_BUSIEST] + spread


def _consumers(stage: Stage, site: Site, site_tokens: int) -> list[Consumer]:
    statistics = stage.regularised(site)
    share = 1.0
    if site.kind == "expert":
        share = max(statistics.tokens, 1) / max(site_tokens, 1)
    return [
        Consumer(stage.source.weight(module), statistics, stage.schemes[module], share) for module in site.consumers
    ]

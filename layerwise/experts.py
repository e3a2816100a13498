"""Routed experts of both models, one expert of each in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vl2.calib.experts import Expert, Routes, load_expert, route
from vl2.calib.layer import RoutedPart
from vl2.calib.statistics import ROWS_AT_ONCE
from vl2.layerwise.checkpoints import Pair
from vl2.layerwise.ledger import Ledger
from vl2.layerwise.parts import ModulePair, States, compare_tensors, load_pair, recording
from vl2.layerwise.sums import KINDS
from vl2.layerwise.unfold import unfold_layer
from vl2.quantization import WEIGHT

Advance = Callable[[], None]


@dataclass(frozen=True)
class _Layer:
    """A layer's part and, of the reference, of the quantized part on the reference's states, and of the quantized model
    as it runs: where tokens go, and what the experts give [tokens, H]."""

    pair: Pair
    l: int
    parts: ModulePair
    routes: tuple[Routes, Routes, Routes]
    outputs: tuple[Tensor, Tensor, Tensor]


def run_routed(pair: Pair, l: int, states: States, ledger: Ledger, advance: Advance) -> None:
    """Replaces `states` by those behind the experts of layer l; `advance` is called after each expert."""
    config = pair.config.language_config
    parts = load_pair(pair, lambda: RoutedPart(config), f"language.layers.{l}.", ledger,
                      lambda *tensors: unfold_layer(pair, l, "mlp", tensors))
    routes = _routes(pair, parts, states)
    ledger.add_router(l, _changed(routes, states.modality))
    outputs = [torch.zeros_like(states.reference), torch.zeros_like(states.reference)]
    outputs.append(outputs[1] if states.same else torch.zeros_like(states.reference))
    layer = _Layer(pair, l, parts, routes, tuple(outputs))
    for e in range(config.n_routed_experts):
        _run_expert(layer, e, states, ledger)
        advance()
    _run_shared(layer, states, ledger)
    name = f"layers.{l}.mlp"
    reference, own, stream = outputs
    ledger.sums("own", name).add(reference, own - reference, states.modality)
    if not (states.same and torch.equal(reference, own)):
        states.part()
        states.quantized += stream
    states.reference += reference
    ledger.sums("stream", name).add(states.reference, states.quantized - states.reference, states.modality)


def _routes(pair: Pair, parts: ModulePair, states: States) -> tuple[Routes, Routes, Routes]:
    config = pair.config.language_config
    reference = route(parts.reference, states.reference, config)
    own = reference if parts.same else route(parts.quantized, states.reference, config)
    return reference, own, own if states.same else route(parts.quantized, states.quantized, config)


def _changed(routes: tuple[Routes, Routes, Routes], modality: Tensor) -> np.ndarray:
    """int [2, 3] for `Ledger.add_router`. Sets are compared: the order of the chosen experts means nothing."""
    chosen, own, stream = (one.idx.sort(dim=1).values for one in routes)
    changed = torch.stack([(chosen != other).any(dim=1) for other in (stream, own)], dim=1).long()
    counts = [[int((modality == kind).sum()), *changed[modality == kind].sum(dim=0).tolist()]
              for kind in range(len(KINDS))]
    return np.array(counts, np.int64)


def _run_expert(layer: _Layer, e: int, states: States, ledger: Ledger) -> None:
    """Adds expert e's outputs."""
    mine, theirs = (load_expert(weights, layer.l, e) for weights in (layer.pair.reference, layer.pair.quantized))
    errors = _expert_errors(layer, e, (mine, theirs), ledger)
    norms = [part.post_attention_layernorm for part in (layer.parts.reference, layer.parts.quantized)]
    for rows, weight in _chunks(layer.routes[0], e):
        x = norms[0](states.reference[rows])
        gate, up = F.linear(x, mine.gate), F.linear(x, mine.up)
        inner = F.silu(gate) * up
        y = F.linear(inner, mine.down)
        for (name, error), entering, leaving in zip(errors, (x, x, inner), (gate, up, y), strict=True):
            if error is not None:
                ledger.sums("outputs", name).add(leaving, F.linear(entering, error), states.modality[rows])
        layer.outputs[0].index_add_(0, rows, y * weight[:, None])
    runs = [(1, states.reference)] + ([] if states.same else [(2, states.quantized)])
    for run, hidden in runs:
        for rows, weight in _chunks(layer.routes[run], e):
            y = F.linear(theirs.inner(norms[1](hidden[rows])), theirs.down)
            layer.outputs[run].index_add_(0, rows, y * weight[:, None])


def _chunks(routes: Routes, e: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(*(part.split(ROWS_AT_ONCE) for part in routes.of(e)), strict=True)


def _expert_errors(layer: _Layer, e: int, experts: tuple[Expert, Expert], ledger: Ledger
                   ) -> list[tuple[str, Tensor | None]]:
    """Name and Ŵ − W of gate, up and down, None where nothing differs; compares them into the ledger."""
    sources = layer.pair.reference.sources
    names = [sources[f"language.layers.{layer.l}.mlp.experts.{matrix}_proj"][e] for matrix in Expert._fields]
    reference, stored = (dict(zip(names, expert, strict=True)) for expert in experts)
    norm = f"language.model.layers.{layer.l}.post_attention_layernorm{WEIGHT}"
    gammas = [part.post_attention_layernorm.weight for part in (layer.parts.reference, layer.parts.quantized)]
    reference[norm], stored[norm] = gammas
    plain = unfold_layer(layer.pair, layer.l, "mlp", (reference, stored))
    del reference[norm]  # compared with the rest of the part
    errors = compare_tensors(layer.pair, reference, plain, ledger)
    return [(name, errors.get(name)) for name in names]


def _run_shared(layer: _Layer, states: States, ledger: Ledger) -> None:
    """Adds the shared experts' outputs; records the router's logits on the reference's states."""
    mine, theirs = layer.parts.reference, layer.parts.quantized
    for start in range(0, len(states.modality), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        x = mine.post_attention_layernorm(states.reference[rows])
        if "mlp.gate" in layer.parts.errors:
            name, error = layer.parts.errors["mlp.gate"]
            ledger.sums("outputs", name).add(F.linear(x, mine.mlp.gate.weight), F.linear(x, error),
                                             states.modality[rows])
        if mine.mlp.shared_experts is None:
            continue
        with recording(mine, layer.parts.errors, states.modality[rows], ledger):
            layer.outputs[0][rows] += mine.mlp.shared_experts(x)
        runs = [(1, states.reference)] + ([] if states.same else [(2, states.quantized)])
        for run, hidden in runs:
            x = theirs.post_attention_layernorm(hidden[rows])
            layer.outputs[run][rows] += theirs.mlp.shared_experts(x)

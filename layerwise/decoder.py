"""The decoder layers of both models over all sequences, one layer's weights in memory, experts one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from vl2.calib.layer import AttentionPart, DensePart
from vl2.calib.statistics import ROWS_AT_ONCE
from vl2.errors import VL2Error
from vl2.layerwise.checkpoints import Pair
from vl2.layerwise.experts import run_routed
from vl2.layerwise.ledger import Ledger
from vl2.layerwise.parts import States, load_pair, run_part
from vl2.layerwise.unfold import unfold_layer
from vl2.model.checkpoint import all_finite

Advance = Callable[[str, float], None]


def run_layer(pair: Pair, l: int, states: States, spans: Sequence[tuple[int, int]], told: tuple[Ledger, Advance]
              ) -> States:
    """The states behind layer l; spans: rows of each sequence; told: the ledger, and what is called with a step of
    `layer_work` ("attention", "dense" or "expert" output) and the share of it that is done.

    Raises VL2Error where an output is not finite.
    """
    ledger, advance = told
    config = pair.config.language_config
    parts = load_pair(pair, lambda: AttentionPart(config), f"language.layers.{l}.", ledger,
                      lambda *tensors: unfold_layer(pair, l, "attention", tensors))
    slices = _telling([slice(*span) for span in spans], len(states.modality),
                      lambda share: advance("attention output", share))
    states = run_part(parts, states, slices, (f"layers.{l}.attention", True), ledger)
    if config.is_moe(l):
        share = 1 / config.n_routed_experts
        run_routed(pair, l, states, ledger, lambda: advance("expert output", share))
    else:
        states = _run_dense(pair, l, states, told)
    for side, hidden in (("reference", states.reference), ("quantized", states.quantized)):
        if not all_finite(hidden):
            raise VL2Error(f"layer {l} of the {side} model gives numbers that are not finite",
                           "its weights are broken, or its activations exceed float32")
    return states


def _run_dense(pair: Pair, l: int, states: States, told: tuple[Ledger, Advance]) -> States:
    ledger, advance = told
    config, count = pair.config.language_config, len(states.modality)
    parts = load_pair(pair, lambda: DensePart(config), f"language.layers.{l}.", ledger,
                      lambda *tensors: unfold_layer(pair, l, "mlp", tensors))
    chunks = [slice(start, min(start + ROWS_AT_ONCE, count)) for start in range(0, count, ROWS_AT_ONCE)]
    slices = _telling(chunks, count, lambda share: advance("dense output", share))
    return run_part(parts, states, slices, (f"layers.{l}.mlp", True), ledger)


def _telling(slices: list[slice], count: int, advance: Callable[[float], None]) -> Iterator[slice]:
    for rows in slices:
        yield rows
        advance((rows.stop - rows.start) / count)

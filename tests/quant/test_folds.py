"""AWQ's folds on whole models, without rounding: they must change nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.quant.layer_files import put_into, write_statistics
from vl2.model.checkpoint import load_model
from vl2.model.vl2 import DeepseekVL2
from vl2.quant.fold import Stage, fold_norms, fold_unit, search_norm_scales
from vl2.quant.method import METHODS
from vl2.quant.recipe import assign_schemes, builtin_recipe
from vl2.quant.sites import layer_units, router_of
from vl2.quant.source import Source
from vl2.quant.statistics import LayerStatistics

PLACES = [(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")]


class DoubleSource(Source):
    """Weights in float64, so that only the order of sums is left to differ."""

    def tensor(self, name: str) -> Tensor:
        return super().tensor(name).double()

    def weight(self, module: str) -> Tensor:
        return self.tensor(f"{module}.weight")


def decode(model: DeepseekVL2, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Hidden states after the final norm, float64, and every router's choices, sorted."""
    chosen: list[Tensor] = []
    language = model.config.language_config
    gates = [layer.mlp.gate for l, layer in enumerate(model.language.layers) if language.is_moe(l)]
    record = lambda gate, inputs, routing: chosen.append(routing.idx.sort().values)  # noqa: E731
    hooks = [gate.register_forward_hook(record) for gate in gates]
    tokens = hidden.shape[1]
    torch.set_default_dtype(torch.float64)  # the mask's constants are of the default dtype
    try:
        with torch.no_grad():
            states, _ = model.language(hidden, torch.arange(tokens)[None], torch.ones(1, tokens, dtype=torch.bool))
    finally:
        torch.set_default_dtype(torch.float32)
        for hook in hooks:
            hook.remove()
    return states, chosen


def test_folds_change_no_output_and_no_routing_in_float64(mini_folder: Path, tmp_path: Path) -> None:
    source = DoubleSource(mini_folder)
    schemes = assign_schemes(builtin_recipe("int4", source.config), source.config)
    model = load_model(mini_folder, torch.float64)
    hidden = torch.randn(1, 20, source.config.language_config.hidden_size, dtype=torch.float64)
    before, chosen = decode(model, hidden)
    for layer, stage in PLACES:
        path = write_statistics(tmp_path / f"{layer}.{stage}", source.config, (layer, stage), {})
        made = Stage(source, LayerStatistics(path), schemes, METHODS["awq"])
        folded, moved = fold_without_rounding(made, layer, stage)
        assert moved >= 2, "nothing was folded"
        put_into(model, folded)
    after, still_chosen = decode(model, hidden)
    # the router computes in float32 whatever its input, and rounds its folded weights: 6e-8 of scores below 1
    assert float((after - before).abs().max()) <= 1e-6 * float(before.abs().max())
    assert all(torch.equal(got, want) for got, want in zip(still_chosen, chosen, strict=True))


def fold_without_rounding(stage: Stage, layer: int, name: str) -> tuple[dict[str, Tensor], int]:
    language = stage.source.config.language_config
    units = layer_units(language, layer, name)
    norm_scales = search_norm_scales(stage, units)
    tensors = fold_norms(stage, norm_scales, router_of(language, layer, name))
    moved = sum(bool((scale != 1).any()) for scale in norm_scales.values())
    for unit in units:
        weights = {module: stage.source.weight(module) for module in unit.modules}
        scales, biases = fold_unit(stage, unit, weights, norm_scales)
        moved += sum(bool((scale != 1).any()) for scale in scales.values())
        tensors |= biases | {f"{module}.weight": weight for module, weight in weights.items()}
    return tensors, moved

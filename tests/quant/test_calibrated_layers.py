"""Layers quantized from statistics files: exact folds, experts with few tokens, what comes back, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.quant.layer_files import site_inputs, write_statistics
from vl2.config import ModelConfig
from vl2.errors import VL2Error
from vl2.quant.checkpoint import QuantizedCheckpoint
from vl2.quant.method import METHODS
from vl2.quant.parts import Part
from vl2.quant.quantizer import QuantizeOptions, Quantizer
from vl2.quant.recipe import OuterParts
from vl2.quant.shard import write_shard
from vl2.quant.sites import layer_units
from vl2.quant.statistics import LayerStatistics

PLACES = [(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")]
CALIBRATED = QuantizeOptions(method="awq+gptq")


def test_a_calibrated_layer_comes_back_whole_and_never_worse_than_rounding(goldens: Path, tmp_path: Path) -> None:
    quantizer = Quantizer(goldens / "small-mini", tmp_path / "out", CALIBRATED)
    made: dict[str, Tensor] = {}
    for stage in ("attention", "mlp"):
        path = write_statistics(tmp_path / "statistics", quantizer.source.config, (1, stage), {})
        back = quantizer.quantize_layer(1, stage, path)
        assert set(back) == set(quantizer.parts[Part(stage, 1)])
        assert all(bool(tensor.isfinite().all()) for tensor in back.values())
        made |= back
    for part in quantizer.parts:
        quantizer.quantize_part(part)
    read = QuantizedCheckpoint(quantizer.finish()).tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in made.items())
    reports = json.loads((tmp_path / "out" / "quantization.json").read_text())["matrices"]
    assert all(report["over_rtn"] <= 1 for report in reports)
    assert "gptq+search" in {report["method"] for report in reports if ".layers.1." in report["module"]}


def test_folded_norms_and_routers_are_stored_in_float32(goldens: Path, tmp_path: Path) -> None:
    """base-mini is bfloat16, which would round the router's folded weights and move its choices."""
    quantizer = Quantizer(goldens / "base-mini", tmp_path / "out", QuantizeOptions(method="awq"))
    path = write_statistics(tmp_path / "statistics", quantizer.source.config, (1, "mlp"), {})
    back = quantizer.quantize_layer(1, "mlp", path)
    for name in ("post_attention_layernorm", "mlp.gate"):
        assert back[f"language.model.layers.1.{name}.weight"].dtype == torch.float32
    assert back["language.model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [0, 1])
def test_experts_with_no_or_one_token_get_finite_positive_scales(goldens: Path, tmp_path: Path, tokens: int) -> None:
    quantizer = Quantizer(goldens / "tiny-mini", tmp_path / "out", CALIBRATED)
    few = {f"expert.{e}.{site}": tokens for e in range(6) for site in ("input", "down")}
    path = write_statistics(tmp_path / "statistics", quantizer.source.config, (1, "mlp"), few)
    back = quantizer.quantize_layer(1, "mlp", path)
    for e in range(12):
        made = back.quantized(f"language.model.layers.1.mlp.experts.{e}.down_proj")
        assert bool(made.scales.isfinite().all()) and bool((made.scales > 0).all())
    assert all(bool(tensor.isfinite().all()) for tensor in back.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_quantizes_a_layer(goldens: Path, tmp_path: Path, method: str) -> None:
    quantizer = Quantizer(goldens / "tiny-mini", tmp_path / "out", QuantizeOptions(method=method))
    config = quantizer.source.config
    back = quantizer.quantize_layer(0, "mlp", write_statistics(tmp_path / "s", config, (0, "mlp"), {}))
    norm = "language.model.layers.0.post_attention_layernorm.weight"
    changed = not torch.equal(back[norm], quantizer.source.tensor(norm))
    assert changed == METHODS[method].folds


def test_a_finished_layer_is_read_back_and_not_made_again(goldens: Path, tmp_path: Path) -> None:
    place = goldens / "tiny-mini", tmp_path / "out", CALIBRATED
    first = Quantizer(*place)
    path = write_statistics(tmp_path / "statistics", first.source.config, (0, "attention"), {})
    made = dict(first.quantize_layer(0, "attention", path))
    counted: list[str] = []
    again = Quantizer(*place, lambda module, done, total: counted.append(module))
    back = again.quantize_layer(0, "attention", path)
    assert all(torch.equal(back[name], tensor) for name, tensor in made.items())
    assert not counted, "what an earlier run did is not told again"


def test_a_norm_whose_consumers_are_partly_kept_is_not_folded(goldens: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.json"
    rules = [("*.mlp.gate", "keep"), ("*.shared_experts.*", "keep"), ("*.experts.*", "int4"), ("*", "keep")]
    recipe.write_text(json.dumps({"name": "mine", "rules": [{"modules": m, "scheme": s} for m, s in rules]}))
    options = QuantizeOptions(recipe=str(recipe), outer=OuterParts(), method="awq+gptq")
    quantizer = Quantizer(goldens / "tiny-mini", tmp_path / "out", options)
    back = quantizer.quantize_layer(1, "mlp", write_statistics(tmp_path / "s", quantizer.source.config, (1, "mlp"), {}))
    for name in ("post_attention_layernorm.weight", "mlp.gate.weight", "mlp.shared_experts.up_proj.weight"):
        name = f"language.model.layers.1.{name}"
        assert torch.equal(back[name], quantizer.source.tensor(name)), name


def test_the_head_is_quantized_by_its_own_statistics(goldens: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(outer=OuterParts(lm_head="int8"), method="gptq+search")
    quantizer = Quantizer(goldens / "tiny-mini", tmp_path / "out", options)
    path = tmp_path / "head"
    write_shard(path, {"lm_head.input.hessian": torch.eye(96), "lm_head.input.abs_mean": torch.ones(96),
                       "lm_head.input.tokens": torch.tensor([50, 50])})
    quantizer.quantize_part(Part("head"), LayerStatistics(path))
    (reports,) = (tmp_path / "out.partial").glob("model-*.json")
    (report,) = json.loads(reports.read_text())
    assert report["module"] == "language.lm_head" and report["tokens"] == 100


def test_statistics_of_another_layer_kind_are_refused_by_site(goldens: Path, tmp_path: Path) -> None:
    quantizer = Quantizer(goldens / "tiny-mini", tmp_path / "out", CALIBRATED)
    path = write_statistics(tmp_path / "s", quantizer.source.config, (0, "mlp"), {})
    with pytest.raises(VL2Error, match="lacks `.*expert"):
        quantizer.quantize_layer(1, "mlp", path)


def test_statistics_with_nan_are_refused_by_name(goldens: Path, tmp_path: Path) -> None:
    quantizer = Quantizer(goldens / "tiny-mini", tmp_path / "out", CALIBRATED)
    config = quantizer.source.config
    path, tensors = tmp_path / "s", {}
    for site, size in site_inputs(config, 0, "attention").items():
        tensors |= {f"{site}.hessian": torch.full((size, size), float("nan")), f"{site}.abs_mean": torch.ones(size),
                    f"{site}.tokens": torch.tensor([3, 4])}
    write_shard(path, tensors)
    with pytest.raises(VL2Error, match=r"attention\.input\.hessian.*NaN"):
        quantizer.quantize_layer(0, "attention", path)


def test_tokens_that_nearly_went_to_an_expert_count_by_their_weight(tmp_path: Path) -> None:
    ones = torch.ones(4)
    path = tmp_path / "s"
    write_shard(path, {
        "e.down.hessian": torch.eye(4) * 4, "e.down.abs_mean": ones, "e.down.tokens": torch.tensor([2, 1]),
        "e.down.extra.hessian": torch.eye(4), "e.down.extra.abs_mean": ones,
        "e.down.extra.tokens": torch.tensor([9, 9]),
        "e.down.extra.weight": torch.tensor([9.0]),
    })  # fmt: skip
    statistics = LayerStatistics(path)
    joined = statistics.with_extra("e.down", statistics.site("e.down"))
    assert joined.tokens == 12 and torch.allclose(joined.hessian, torch.eye(4) * (3 * 4 + 9 * 1) / 12)


def test_values_that_serve_several_query_heads_are_not_folded(goldens: Path) -> None:
    values = json.loads((goldens / "tiny-mini" / "config.json").read_text())
    values["language_config"]["num_key_value_heads"] = 2
    language = ModelConfig.from_dict(values).language_config
    (unit,) = layer_units(language, 0, "attention")
    assert unit.sites[1].name == "attention.output" and unit.sites[1].row_source is None

"""Reading `quantization_config` and inspecting a checkpoint that has one, without torch."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from vl2.errors import VL2Error
from vl2.inspection import describe, inspect_path
from vl2.prompt import Processor
from vl2.quantization import Form, QuantizationConfig

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group", "group_size": 32}
VALUES: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:.*gate$"],
    "config_groups": {
        "group_0": {"targets": ["re:.*experts.*"], "weights": INT4},
        "group_1": {"targets": ["Linear"], "weights": INT4 | {"num_bits": 8, "strategy": "channel"}},
    },
}


def test_ignore_goes_first_then_the_first_group_that_matches() -> None:
    config = QuantizationConfig.from_dict(VALUES)
    forms = {name: config.form_of(name) for name in ("a.mlp.gate", "a.experts.3.up_proj", "lm_head", "embed_tokens")}
    assert list(forms.values()) == [None, Form(4, 32), Form(8, None), None]


@pytest.mark.parametrize("path, value, message", [
    ("quant_method", "gptq", r"quant_method` is 'gptq'"),
    ("format", "int-quantized", "format` is 'int-quantized'"),
    ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
    ("bits", 4, "unknown key `quantization_config.bits`"),
    ("config_groups.group_0.weights.symmetric", False, "weights.symmetric` is False"),
    ("config_groups.group_0.weights.actorder", "group", "weights.actorder` is 'group'"),
    ("config_groups.group_0.weights.num_bits", 3, "weights.num_bits` is 3"),
    ("config_groups.group_0.weights.group_size", None, "group_size` is None"),
    ("config_groups.group_0.input_activations", {"num_bits": 8}, "input_activations"),
    ("config_groups.group_0.weights.zero", 1, "unknown key `quantization_config.config_groups.group_0.weights.zero`"),
    ("config_groups.group_0.targets", "Linear", "targets` is 'Linear'"),
    ("config_groups", {}, "expected an object with one group"),
])  # fmt: skip
def test_what_is_not_read_is_refused_by_name(path: str, value: Any, message: str) -> None:
    values = copy.deepcopy(VALUES)
    *parents, key = path.split(".")
    place = values
    for parent in parents:
        place = place[parent]
    place[key] = value
    with pytest.raises(VL2Error, match=message):
        QuantizationConfig.from_dict(values)


def test_a_quantized_checkpoint_is_inspected_with_bits_by_module(quantized_of, goldens: Path) -> None:
    folder = quantized_of(goldens / "tiny-mini", "int4")
    plain, facts = inspect_path(goldens / "tiny-mini"), inspect_path(folder)
    assert facts["quantization"] == {"recipe": "int4", "method": "rtn"} and plain["quantization"] is None
    assert facts["parameters"] == plain["parameters"]
    assert set(facts["modules"]["experts"]["dtypes"]) == {"int4 g32"}
    assert set(facts["modules"]["embed_tokens"]["dtypes"]) == {"int8"}
    text = describe(facts)
    assert "quantized: recipe int4, method rtn" in text and "int4 g32" in text


def test_a_packed_tensor_that_config_json_does_not_know_is_named(quantized_of, goldens: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in quantized_of(goldens / "tiny-mini", "int4").iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:.*o_proj$")
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VL2Error, match="o_proj.weight_packed"):
        inspect_path(folder)


def test_the_processor_reads_a_quantized_folder(quantized_of, goldens: Path) -> None:
    folder = quantized_of(goldens / "tiny-mini", "int4")
    assert Processor.from_folder(folder).geometry == Processor.from_folder(goldens / "tiny-mini").geometry


INT8 = INT4 | {"num_bits": 8, "strategy": "channel"}
EXACT, PATTERN, CLASS = (["model.o_proj"], INT4 | {"group_size": 64}), (["re:.*proj"], INT4), (["Linear"], INT8)


@pytest.mark.parametrize("order", [(CLASS, PATTERN, EXACT), (EXACT, CLASS, PATTERN), (PATTERN, EXACT, CLASS)])
def test_the_most_specific_target_decides_in_whatever_order_the_groups_stand(order: tuple) -> None:
    """compressed-tensors' `match_targets`: exact names, then patterns, then classes."""
    groups = {f"group_{i}": {"targets": targets, "weights": weights} for i, (targets, weights) in enumerate(order)}
    config = QuantizationConfig.from_dict(VALUES | {"config_groups": groups})
    forms = [config.form_of(name) for name in ("model.o_proj", "model.q_proj", "model.lm_head")]
    assert forms == [Form(4, 64), Form(4, 32), Form(8, None)]


def test_of_two_patterns_the_first_by_its_text_decides_and_of_equal_targets_the_last_group() -> None:
    """compressed-tensors sorts patterns, and keeps targets in a dict in which a later group replaces an earlier."""
    groups = {"a": {"targets": ["re:b.*", "re:.*proj"], "weights": INT8}, "b": {"targets": ["re:.*proj"],
                                                                              "weights": INT4}}
    config = QuantizationConfig.from_dict(VALUES | {"config_groups": groups})
    assert config.form_of("b.proj") == Form(4, 32) and config.form_of("b.rest") == Form(8, None)

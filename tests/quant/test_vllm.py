"""`--for vllm`: what config.json says, against the guide's account of vLLM's class (section 3.9); vLLM is not run.

`scheme_in_vllm` repeats how it looks a Linear up: the ignore list by name, targets by name, then targets by class.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.conftest import GOLDENS
from vl2.config import ModelConfig, load_config
from vl2.errors import VL2Error
from vl2.quant.checkpoint import QuantizedCheckpoint
from vl2.quant.linears import expert_layer, is_router, matrices
from vl2.quant.quantization_config import form_of, write_config
from vl2.quant.quantizer import QuantizeOptions, quantize_checkpoint, recipe_for
from vl2.quant.recipe import OuterParts, Recipe, Rule, assign_schemes, read_recipe

TINY = GOLDENS / "tiny-mini"


def published_config(variant: str) -> ModelConfig:
    return ModelConfig.from_dict(json.loads((GOLDENS / "published" / f"{variant}.config.json").read_text()))


def forms(config: ModelConfig, recipe: Recipe) -> dict:
    return {module: form_of(scheme) for module, scheme in assign_schemes(recipe, config).items()}


def for_vllm(config: ModelConfig, name: str = "int4") -> dict:
    return forms(config, recipe_for(QuantizeOptions(recipe=name, target="vllm"), config))


def scheme_in_vllm(written: dict, name: str) -> tuple[int, int | None] | None:
    """Bits and group size that vLLM gives a Linear of this name ("" where its class passes none on)."""
    if any(re.match(pattern.removeprefix("re:"), name) for pattern in written["ignore"]):
        return None
    groups = [(target, group["weights"]) for group in written["config_groups"].values() for target in group["targets"]]
    named = [w for target, w in groups if target.startswith("re:") and re.match(target[3:], name)]
    found = named or [w for target, w in groups if target == "Linear"]
    return (found[0]["num_bits"], found[0].get("group_size")) if found else None


def name_in_vllm(module: str) -> str:
    """Its own prefix for the language part; plain attention is built without one."""
    return "" if ".self_attn." in module else module.replace("language.", "language_model.", 1)


@pytest.mark.parametrize("published, recipe", [
    ("tiny", "int4"), ("tiny", "int8"), ("small", "int4-g128"),
])  # fmt: skip
def test_vllm_finds_for_every_matrix_of_a_published_model_the_form_that_is_in_the_file(
    published: str, recipe: str
) -> None:
    config = published_config(published)
    made = for_vllm(config, recipe)
    written = write_config(made, for_vllm=True)
    for module, form in made.items():
        if module.startswith("language.model.layers.") and not is_router(module):
            assert form is not None and scheme_in_vllm(written, name_in_vllm(module)) == (form.bits, form.group_size)
            assert form.group_size in (None, 32, 64, 128) and matrices(config)[module][1] % (form.group_size or 1) == 0
        else:
            assert form is None and scheme_in_vllm(written, module) is None, module
    layers: dict[int, set] = {}
    for module, form in made.items():
        if expert_layer(module) is not None:
            layers.setdefault(expert_layer(module), set()).add(form)
    assert layers and all(len(found) == 1 for found in layers.values())


def test_the_linears_beside_the_experts_are_one_group_of_their_class_alone() -> None:
    config = load_config(TINY)
    written = write_config(for_vllm(config), for_vllm=True)
    first, last = written["config_groups"].values()
    assert first["weights"]["num_bits"] == 4 and all("experts" in target for target in first["targets"])
    assert last["targets"] == ["Linear"] and last["weights"]["num_bits"] == 8
    ignored = " ".join(written["ignore"])
    assert all(word in ignored for word in ("lm_head", "embed_tokens", "vision", "projector", "gate"))


def test_the_group_that_all_linears_share_is_the_largest_that_fits() -> None:
    """Tiny's dense layer has 6848 inputs: 64 for all; where not even 32 fits, one scale a row."""
    made = for_vllm(published_config("tiny"))
    assert made["language.model.layers.0.self_attn.q_proj"].group_size == 64
    assert for_vllm(load_config(TINY))["language.model.layers.0.self_attn.q_proj"].group_size is None


def test_attention_may_stay_as_it_is_with_all_linears_but_the_experts() -> None:
    config = load_config(TINY)
    rules = (Rule("*.mlp.gate", "keep"), Rule("*.experts.*", "int4"), Rule("*", "keep"))
    written = write_config(forms(config, Recipe("experts", rules, "vllm")), for_vllm=True)
    (group,) = written["config_groups"].values()
    assert group["targets"] != ["Linear"] and scheme_in_vllm(written, "") is None


DECODER = "language.model.layers.*"


@pytest.mark.parametrize("rules, named", [
    ([("*.gate", "keep"), ("*.experts.*", "int4"), ("*.self_attn.*", "keep"), (DECODER, "int8"), ("*", "keep")],
     "q_proj"),
    ([("*.gate", "keep"), ("*.o_proj", "int8-channel"), (DECODER, "int8"), ("*", "keep")], "o_proj"),
    ([("*.gate", "keep"), (DECODER, "int8"), ("vision.*", "int8-channel"), ("*", "keep")], "vision.blocks.0"),
    ([("*.gate", "keep"), (DECODER, "int4"), ("*", "keep")], "int4"),
])  # fmt: skip
def test_recipes_that_vllm_cannot_load_are_refused_with_a_hint(rules: list, named: str) -> None:
    recipe = Recipe("mine", tuple(Rule(*rule) for rule in rules), "vllm")
    with pytest.raises(VL2Error, match=named) as refused:
        assign_schemes(recipe, load_config(TINY))
    assert refused.value.hint


@pytest.mark.parametrize("part", ["vision", "lm_head", "embeddings"])
def test_quantized_outer_parts_are_refused_with_the_option_to_leave_out(part: str) -> None:
    config = load_config(TINY)
    options = QuantizeOptions(target="vllm", outer=OuterParts(**{part: "int8"}))
    with pytest.raises(VL2Error, match="vLLM builds") as refused:
        assign_schemes(recipe_for(options, config), config)
    assert "--vision" in refused.value.hint


def test_a_recipe_file_may_name_its_target(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    rules = [{"modules": "*", "scheme": "keep"}]
    path.write_text(json.dumps({"name": "mine", "rules": rules, "target": "vllm"}))
    assert recipe_for(QuantizeOptions(recipe=str(path)), load_config(TINY)).target == "vllm"
    path.write_text(json.dumps({"name": "mine", "rules": rules, "target": "other"}))
    with pytest.raises(VL2Error, match="'other'"):
        read_recipe(path)


def test_the_checkpoint_on_disk_reads_back_by_the_same_config(tmp_path: Path) -> None:
    folder = quantize_checkpoint(TINY, tmp_path / "q", QuantizeOptions(method="rtn", target="vllm"))
    made = QuantizedCheckpoint(folder)  # strict: every tensor as quantization_config says
    assert made.forms == for_vllm(made.config)
    facts = json.loads((folder / "quantization.json").read_text())
    assert facts["recipe"]["target"] == "vllm"
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationConfig

    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    written.pop("version")
    assert len(QuantizationConfig.model_validate(written).config_groups) == 2

from __future__ import annotations

import re

import pytest

from vl2.config import ModelConfig, load_config
from vl2.errors import VL2Error
from vl2.quant.quantization_config import Form, form_of, read_config, write_config
from vl2.quant.recipe import OuterParts, Recipe, Rule, assign_schemes, builtin_recipe


def forms_of(folder, recipe_name: str = "int4") -> dict[str, Form | None]:
    config = load_config(folder)
    outer = OuterParts(vision="int8", lm_head="int8")
    return forms_by(builtin_recipe(recipe_name, config, outer), config)


def forms_by(recipe: Recipe, config: ModelConfig) -> dict[str, Form | None]:
    return {module: form_of(scheme) for module, scheme in assign_schemes(recipe, config).items()}


@pytest.mark.parametrize("recipe", ["int8", "int4", "int4-g128"])
def test_reading_gives_back_the_forms_that_were_written(mini_folder, recipe: str) -> None:
    forms = forms_of(mini_folder, recipe)
    assert read_config(write_config(forms), forms) == forms


def test_layers_that_differ_are_listed(goldens) -> None:
    config = load_config(goldens / "tiny-mini")
    recipe = Recipe("mixed", (
        Rule("*.mlp.gate", "keep"), Rule("*.layers.2.mlp.experts.*", "int8-channel"),
        Rule("*.experts.*", "int4"), Rule("*", "keep"),
    ))  # fmt: skip
    forms = forms_by(recipe, config)
    assert read_config(write_config(forms), forms) == forms


def test_every_module_matches_one_group_or_the_ignore_list_alone(mini_folder) -> None:
    """First-match order must not matter: other readers have their own."""
    forms = forms_of(mini_folder)
    written = write_config(forms)
    lists = [group["targets"] for group in written["config_groups"].values()] + [written["ignore"]]
    for module in forms:
        hits = [targets for targets in lists if any(re.match(target[3:], module) for target in targets)]
        assert len(hits) == 1, module


def test_the_language_part_alone_is_named_by_the_same_expressions(mini_folder) -> None:
    forms = {m: f for m, f in forms_of(mini_folder).items() if m.startswith("language.")}
    alone = {module.removeprefix("language."): form for module, form in forms.items()}
    assert read_config(write_config(forms), alone) == alone


def test_only_the_routed_experts_group_says_experts(goldens) -> None:
    """transformers finds the experts' group by that word."""
    groups = write_config(forms_of(goldens / "tiny-mini"))["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups if "experts" in str(group["targets"])} == {4}


@pytest.mark.parametrize("key, value", [
    ("symmetric", False), ("type", "float"), ("num_bits", 3), ("dynamic", True), ("strategy", "block"),
    ("actorder", "group"),
])  # fmt: skip
def test_grids_that_we_cannot_read_are_refused_by_key(goldens, key: str, value: object) -> None:
    forms = forms_of(goldens / "tiny-mini")
    written = write_config(forms)
    written["config_groups"]["group_0"]["weights"][key] = value
    with pytest.raises(VL2Error, match=key):
        read_config(written, forms)


def test_another_method_is_refused() -> None:
    with pytest.raises(VL2Error, match="'gptq'"):
        read_config({"quant_method": "gptq"}, [])


def test_class_targets_of_other_writers_are_understood(goldens) -> None:
    forms = forms_of(goldens / "tiny-mini")
    written = write_config(forms)
    written["config_groups"] = {"group_0": written["config_groups"]["group_1"] | {"targets": ["Linear"]}}
    written["ignore"] = ["language.lm_head", "re:.*gate$"]
    read = read_config(written, forms)
    assert read["language.lm_head"] is None and read["language.model.embed_tokens"] is None
    assert read["language.model.layers.0.mlp.up_proj"] is not None


def test_our_config_is_valid_for_the_compressed_tensors_package(mini_folder) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    written = write_config(forms_of(mini_folder))
    written.pop("version")
    parsed = quantization.QuantizationConfig.model_validate(written)
    assert len(parsed.config_groups) == len(written["config_groups"])

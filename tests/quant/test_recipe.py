from __future__ import annotations

import json
from pathlib import Path

import pytest

from vl2.config import ModelConfig, load_config
from vl2.errors import VL2Error
from vl2.json_file import to_json
from vl2.quant.linears import is_router, matrices
from vl2.quant.recipe import OuterParts, Recipe, Rule, assign_schemes, builtin_recipe, fell_back, read_recipe

NAMES = ("int8", "int4", "int4-g64", "int4-g128")


@pytest.fixture(params=["tiny", "small", "base"])
def published(request: pytest.FixtureRequest, goldens: Path) -> ModelConfig:
    values = json.loads((goldens / "published" / f"{request.param}.config.json").read_text())
    return ModelConfig.from_dict(values)


@pytest.fixture
def tiny_mini(goldens: Path) -> ModelConfig:
    return load_config(goldens / "tiny-mini")


def with_rules(*rules: tuple[str, str]) -> Recipe:
    return Recipe("mine", tuple(Rule(*rule) for rule in rules))


@pytest.mark.parametrize("name", NAMES)
def test_builtin_recipes_decide_on_every_matrix_of_the_published_models(name: str, published: ModelConfig) -> None:
    outer = OuterParts(vision="int8", lm_head="int8", embeddings="int8")
    for parts in (OuterParts(), outer):
        assigned = assign_schemes(builtin_recipe(name, published, parts), published)
        assert assigned.keys() == matrices(published).keys()
        assert all(assigned[module] is None for module in assigned if is_router(module))


def test_int4_keeps_everything_but_the_routed_experts_at_eight_bits_or_more(published: ModelConfig) -> None:
    assigned = assign_schemes(builtin_recipe("int4", published), published)
    four_bits = {module for module, scheme in assigned.items() if scheme is not None and scheme.bits == 4}
    assert four_bits == {module for module in assigned if ".mlp.experts." in module}


def test_a_model_without_experts_gets_a_recipe_without_rules_for_them(goldens: Path) -> None:
    values = json.loads((goldens / "tiny-mini" / "config.json").read_text())
    values["language_config"] |= {"first_k_dense_replace": 100}
    config = ModelConfig.from_dict(values)
    recipe = builtin_recipe("int4", config)
    assert assign_schemes(recipe, config).keys() == matrices(config).keys()
    assert not any("experts" in rule.modules for rule in recipe.rules)


def test_a_recipe_survives_its_file(tmp_path: Path, tiny_mini: ModelConfig) -> None:
    recipe = builtin_recipe("int4", tiny_mini)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(to_json(recipe)))
    assert read_recipe(path) == recipe


def test_a_recipe_file_with_an_unknown_scheme_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"name": "mine", "rules": [{"modules": "*", "scheme": "int3"}]}))
    with pytest.raises(VL2Error, match=r"rules\[0\].*`int3`"):
        read_recipe(path)


def test_a_recipe_file_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"name": "mine", "rules": [{"modules": "*", "scheme": "int8", "group": 32}]}))
    with pytest.raises(VL2Error, match="'group'"):
        read_recipe(path)


def test_the_first_matching_rule_decides(tiny_mini: ModelConfig) -> None:
    recipe = with_rules(("*.mlp.gate", "keep"), ("*.3.mlp.experts.*", "int8"), ("*.experts.*", "int4"), ("*", "keep"))
    assigned = assign_schemes(recipe, tiny_mini)
    assert assigned["language.model.layers.3.mlp.experts.0.up_proj"].bits == 8
    assert assigned["language.model.layers.2.mlp.experts.0.up_proj"].bits == 4


@pytest.mark.parametrize("rules, message", [
    ((("language.*", "keep"), ("vision.*", "keep")), "no rule for `projector"),
    ((("*", "keep"), ("language.*", "int8")), "rule 2 .*decides nothing"),
    ((("language.model.layers.*.q_a_proj", "int8"), ("*", "keep")), "rule 1 .*decides nothing"),
    ((("*.layers.1.mlp.gate", "int8"), ("*", "keep")), "quantizes the router"),
    ((("language.lm_head", "int4"), ("*", "keep")), "stores `language.lm_head` as int4"),
    ((("language.model.embed_tokens", "int4"), ("*", "keep")), "embed_tokens` as int4"),
    ((("*.experts.3.*", "int8"), ("*.experts.*", "int4"), ("*", "keep")), "layer 1 have two schemes"),
])  # fmt: skip
def test_recipes_that_cannot_be_meant_are_refused(rules, message: str, tiny_mini: ModelConfig) -> None:
    with pytest.raises(VL2Error, match=message):
        assign_schemes(with_rules(*rules), tiny_mini)


def test_int4_inputs_that_no_group_divides_are_refused_by_name(goldens: Path) -> None:
    config = load_config(goldens / "base-mini")
    with pytest.raises(VL2Error, match=r"`vision\.blocks\.0\.mlp\.fc2`.*239 inputs"):
        assign_schemes(with_rules(("vision.*", "int4"), ("*", "keep")), config)


def test_outer_parts_offer_no_int4() -> None:
    with pytest.raises(VL2Error, match="`vision` is 'int4'"):
        OuterParts(vision="int4")


def test_an_unknown_builtin_is_refused_with_the_known_ones(tiny_mini: ModelConfig) -> None:
    with pytest.raises(VL2Error, match="int8, int4, int4-g64, int4-g128"):
        builtin_recipe("int2", tiny_mini)


def test_experts_of_a_layer_share_the_group_that_divides_all_their_inputs(goldens: Path) -> None:
    """small-mini's experts have 96 and 48 inputs: 32 divides the first only."""
    config = load_config(goldens / "small-mini")
    assigned = assign_schemes(builtin_recipe("int4", config), config)
    groups = {scheme.group_size for module, scheme in assigned.items() if ".experts." in module}
    assert groups == {16}
    assert all(fell_back(scheme) for module, scheme in assigned.items() if ".experts." in module)


def test_published_tiny_falls_back_in_its_dense_layer_alone(goldens: Path) -> None:
    config = ModelConfig.from_dict(json.loads((goldens / "published" / "tiny.config.json").read_text()))
    assigned = assign_schemes(builtin_recipe("int4-g128", config), config)
    moved = {module: s.group_size for module, s in assigned.items() if s is not None and fell_back(s)}
    assert moved == {"language.model.layers.0.mlp.down_proj": 64}


def test_int8_inputs_that_no_group_divides_get_one_scale_a_row(goldens: Path) -> None:
    config = load_config(goldens / "base-mini")
    assigned = assign_schemes(with_rules(("vision.*", "int8"), ("*", "keep")), config)
    assert assigned["vision.blocks.0.mlp.fc2"].group_size is None

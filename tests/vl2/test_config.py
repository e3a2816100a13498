from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GOLDENS
from vl2.config import LanguageConfig, ModelConfig, RopeScaling, VisionConfig, load_config
from vl2.config_keys import BASE_KEYS, BASE_VALUES, SECTION_KEYS, SECTION_VALUES
from vl2.errors import VL2Error


def published(variant: str) -> dict[str, Any]:
    return json.loads((GOLDENS / "published" / f"{variant}.config.json").read_text())


def changed(variant: str, path: str, value: Any) -> dict[str, Any]:
    """The published configuration with one key set; the path's parts are joined by dots."""
    values = copy.deepcopy(published(variant))
    *sections, key = path.split(".")
    target = values
    for section in sections:
        target = target[section]
    target[key] = value
    return values


# Specification, section 1.2.
EFFECTIVE = {
    "tiny": dict(
        hidden_size=1280, num_hidden_layers=12, num_attention_heads=10, kv_heads=10, use_mla=False, head_dim=128,
        kv_lora_rank=None, intermediate_size=6848, moe_intermediate_size=896, n_routed_experts=64,
        num_experts_per_tok=6, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False,
        routed_scaling_factor=1.0, vocab_size=129280, bos_token_id=0, eos_token_id=1,
    ),
    "small": dict(
        hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, use_mla=True, head_dim=192, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=10944,
        moe_intermediate_size=1408, n_routed_experts=64, num_experts_per_tok=6, scoring_func="softmax",
        topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=1.0, vocab_size=102400, bos_token_id=100000,
        eos_token_id=100001,
    ),
    "base": dict(
        hidden_size=2560, num_hidden_layers=30, num_attention_heads=32, use_mla=True, head_dim=192, kv_lora_rank=512,
        intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=72, num_experts_per_tok=6,
        scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=2.0,
        vocab_size=129280, bos_token_id=0, eos_token_id=1,
    ),
}
COMMON = dict(q_lora_rank=None, n_shared_experts=2, first_k_dense_replace=1, moe_layer_freq=1, rms_norm_eps=1e-6,
              rope_theta=10000.0, rope_scaling=None, attention_bias=False, max_position_embeddings=4096)  # fmt: skip


@pytest.mark.parametrize("variant", EFFECTIVE)
def test_published_configs_have_the_specified_values_with_omitted_keys_filled_in(variant: str) -> None:
    config = ModelConfig.from_dict(published(variant))
    assert config.variant == variant
    for key, value in (EFFECTIVE[variant] | COMMON).items():
        assert getattr(config.language_config, key) == value, key
    assert config.vision_config == VisionConfig(384, 14, 1152, 27, 16, 3.7362)
    assert (config.vision_config.grid, config.vision_config.mlp_hidden) == (27, 4304)
    assert (config.tile_size, config.tokens_per_side, len(config.candidate_resolutions)) == (384, 14, 23)
    assert [config.language_config.is_moe(l) for l in range(3)] == [False, True, True]


def test_the_miniature_configs_load_and_have_the_structure_of_their_namesakes(mini_folder: Path) -> None:
    assert load_config(mini_folder).variant == mini_folder.name.removesuffix("-mini")


def test_a_model_without_experts_or_with_another_router_is_custom() -> None:
    assert ModelConfig.from_dict(changed("tiny", "language_config.n_routed_experts", None)).variant == "custom"
    assert ModelConfig.from_dict(changed("small", "language_config.scoring_func", "sigmoid")).variant == "custom"


def test_any_tile_and_patch_size_works() -> None:
    values = published("tiny")
    values["candidate_resolutions"] = [[112, 112], [224, 112]]
    values["vision_config"] |= {"image_size": 112, "patch_size": 8}
    config = ModelConfig.from_dict(values)
    assert (config.tile_size, config.vision_config.grid, config.tokens_per_side) == (112, 14, 7)


def test_num_key_value_heads_null_means_as_many_as_heads() -> None:
    config = ModelConfig.from_dict(changed("tiny", "language_config.num_key_value_heads", None))
    assert config.language_config.kv_heads == 10


def test_which_layers_are_moe_follows_first_dense_and_frequency() -> None:
    config = LanguageConfig(n_routed_experts=4, num_experts_per_tok=2, topk_method="greedy", moe_layer_freq=2,
                            first_k_dense_replace=3)  # fmt: skip
    assert [l for l in range(9) if config.is_moe(l)] == [4, 6, 8]


@pytest.mark.parametrize("section", ("", "vision_config.", "projector_config.", "language_config."))
def test_an_unknown_key_is_refused_by_name_in_every_section(section: str) -> None:
    name = f"{section or 'config.'}surprise"
    with pytest.raises(VL2Error, match=f"unknown key `{name}` \\(value 7\\)"):
        ModelConfig.from_dict(changed("tiny", f"{section}surprise", 7))


REFUSED = (
    ("quantization_config", {"bits": 4}, "`quantization_config.quant_method` is None"),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}, "`quantization_config.quant_method` is 'gptq'"),
    ("tile_tag", "1D", "`tile_tag` is '1D'.*expected '2D'"),
    ("global_view_pos", "middle", "`global_view_pos` is 'middle'.*'head' or 'tail'"),
    ("model_type", "deepseek_vl", "`config.model_type` is 'deepseek_vl'"),
    ("is_encoder_decoder", True, "`config.is_encoder_decoder` is True"),
    ("candidate_resolutions", [], "`candidate_resolutions` has the entry None"),
    ("candidate_resolutions", [[384, 384], [384]], r"has the entry \[384\]"),
    ("candidate_resolutions", [[384, 384], [500, 384]], "500×384, not a multiple of the tile side 384"),
    ("candidate_resolutions", [[336, 336]], "336, but `vision_config.image_size` is 384"),
    ("vision_config", [], "`vision_config` is list, expected a JSON object"),
    ("vision_config.class_token", True, "`vision_config.class_token` is True.*expected False"),
    ("vision_config.global_pool", "avg", "`vision_config.global_pool` is 'avg'"),
    ("vision_config.ignore_head", False, "`vision_config.ignore_head` is False"),
    ("vision_config.num_classes", 10, "`vision_config.num_classes` is 10"),
    ("vision_config.num_classes", False, "`vision_config.num_classes` is False"),
    ("vision_config.width", 1000, "`vision_config.heads` is 16, which does not divide width 1000"),
    ("vision_config.width", "1152", "`vision_config.width` is '1152', expected int"),
    ("vision_config.layers", True, "`vision_config.layers` is True, expected int"),
    ("vision_config.patch_size", 0, "`vision_config.patch_size` is 0, expected more than 0"),
    ("vision_config.mlp_ratio", float("nan"), "`vision_config.mlp_ratio` is nan, expected float"),
    ("projector_config.projector_type", "linear", "`projector_config.projector_type` is 'linear'"),
    ("projector_config.token_pooling", True, "`projector_config.token_pooling` is True"),
    ("projector_config.depth", 1, "`projector_config.depth` is 1, expected 2 or more"),
    ("projector_config.input_dim", 1024, "`projector_config.input_dim` is 1024, but `vision_config.width` is 1152"),
    ("projector_config.n_embed", 2048, "`projector_config.n_embed` is 2048, but `language_config.hidden_size` is 1280"),
    ("language_config.hidden_act", "gelu", "`language_config.hidden_act` is 'gelu'"),
    ("language_config.tie_word_embeddings", True, "`language_config.tie_word_embeddings` is True"),
    ("language_config.ep_size", 2, "`language_config.ep_size` is 2"),
    ("language_config.pretraining_tp", 2, "`language_config.pretraining_tp` is 2"),
    ("language_config.scoring_func", "relu", "`language_config.scoring_func` is 'relu'"),
    ("language_config.topk_method", "gready", "`language_config.topk_method` is 'gready'"),
    ("language_config.num_experts_per_tok", 65, "is 65, expected 1 to n_routed_experts = 64"),
    ("language_config.num_experts_per_tok", None, "is None, expected 1 to"),
    ("language_config.n_shared_experts", 0, "`language_config.n_shared_experts` is 0"),
    ("language_config.num_attention_heads", 12, "is 12, which does not divide hidden_size 1280"),
    ("language_config.num_key_value_heads", 4, "is 4, which does not divide num_attention_heads 10"),
    ("language_config.num_key_value_heads", 0, "`language_config.num_key_value_heads` is 0"),
    ("language_config.rms_norm_eps", None, "`language_config.rms_norm_eps` is None, expected float"),
    ("language_config.eos_token_id", [1, 2], "`language_config.eos_token_id` is"),
    ("language_config.use_mla", True, "`language_config.kv_lora_rank` is null"),
    ("language_config.use_mla", 1, "`language_config.use_mla` is 1, expected bool"),
    ("language_config.rope_scaling", {"type": "linear"}, "an object with `type` and `factor`"),
    ("language_config.rope_scaling", {"type": "yarn", "factor": 4.0}, "rope_scaling.type` is 'yarn'"),
    ("language_config.rope_scaling", {"type": "linear", "factor": 0.5}, "factor` is 0.5, expected 1 or more"),
    ("language_config.rope_scaling", {"type": "linear", "factor": "4"}, "factor` is '4', expected float"),
    ("language_config.rope_scaling", {"type": "linear", "factor": 4.0, "mscale": 1.0}, "unknown key .*mscale"),
)


@pytest.mark.parametrize("path, value, message", REFUSED, ids=[f"{path}={value}" for path, value, _ in REFUSED])
def test_a_value_that_is_not_supported_is_refused_by_name(path: str, value: Any, message: str) -> None:
    with pytest.raises(VL2Error, match=message):
        ModelConfig.from_dict(changed("tiny", path, value))


@pytest.mark.parametrize(
    "key, value, message",
    (
        ("n_group", None, "`language_config.n_group` is None, expected a divisor of n_routed_experts 72"),
        ("n_group", 5, "`language_config.n_group` is 5, expected a divisor"),
        ("n_group", 72, "noaux_tc needs two or more experts in a group"),
        ("topk_group", 2, "`language_config.topk_group` is 2, expected 1 to n_group = 1"),
        ("qk_rope_head_dim", 63, "`language_config.qk_rope_head_dim` is 63, expected an even number"),
        ("v_head_dim", 0, "`language_config.v_head_dim` is 0"),
        ("q_lora_rank", 0, "`language_config.q_lora_rank` is 0"),
    ),
)
def test_groups_and_latent_sizes_are_checked(key: str, value: Any, message: str) -> None:
    with pytest.raises(VL2Error, match=message):
        ModelConfig.from_dict(changed("base", f"language_config.{key}", value))


def test_a_missing_tile_tag_is_refused() -> None:
    values = published("tiny")
    del values["tile_tag"]
    with pytest.raises(VL2Error, match="lacks `tile_tag`"):
        ModelConfig.from_dict(values)


def test_yarn_is_read_for_latent_attention_with_its_defaults() -> None:
    scaling = {"type": "yarn", "factor": 40, "mscale_all_dim": 0.707}
    config = ModelConfig.from_dict(changed("small", "language_config.rope_scaling", scaling))
    assert config.language_config.rope_scaling == RopeScaling("yarn", 40, 4096, 32, 1, 1.0, 0.707)


def test_every_listed_key_without_effect_is_accepted_and_has_a_reason() -> None:
    values = published("tiny")
    for key in BASE_KEYS:
        values[key] = "anything"
    for key, choices in BASE_VALUES.items():
        values[key] = choices[0]
    for section, keys in SECTION_KEYS.items():
        target = values if section == "config" else values[section]
        target |= dict.fromkeys(keys, "anything")
        target |= {key: choices[0] for key, choices in SECTION_VALUES[section].items()}
    assert ModelConfig.from_dict(values) == ModelConfig.from_dict(published("tiny"))
    for reasons in (BASE_KEYS, *SECTION_KEYS.values()):
        assert all(len(reason) > 20 for reason in reasons.values())


@pytest.mark.parametrize("text, message", (("{", "cannot be read"), ("[]", "holds a list"), (None, "missing")))
def test_a_missing_or_broken_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(VL2Error, match=message) as error:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_refusal_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed("tiny", "surprise", 1)))
    with pytest.raises(VL2Error, match="config.json: config.json has|config.json: .*surprise") as error:
        load_config(tmp_path)
    assert str(tmp_path) in error.value.message

"""Single modules against the recorded outputs of the original's, including settings no published model uses."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import GOLDENS
from tests.tolerances import BFLOAT16_STEP, ROPE_FAR, ROPE_NEAR, ROUTER_WEIGHTS, UNIT, assert_close
from vl2.config import LanguageConfig, ProjectorConfig, RopeScaling
from vl2.model.attention import Attention, LatentAttention
from vl2.model.decoder import Decoder, additive_mask, append_cache
from vl2.model.moe import MoE, Router
from vl2.model.norm import RMSNorm
from vl2.model.projector import Projector, unfold_blocks
from vl2.model.rope import apply_rope, deinterleave, inverse_frequencies, latent_softmax_scale, rope_tables

UNIT_FOLDER = GOLDENS / "unit"
CASES: dict[str, dict[str, dict[str, Any]]] = json.loads((UNIT_FOLDER / "units.json").read_text())
ATTENTION_FORMS = [
    (case, form) for case in CASES["attention"] for form in (("plain",) if "mha" in case else ("absorbed", "naive"))
]
LANGUAGE_KEYS = {field.name for field in dataclasses.fields(LanguageConfig)}

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.inference_mode():
        yield


def arrays(kind: str, case: str) -> dict[str, Tensor]:
    """The recorded arrays of one case."""
    loaded = {name: torch.from_numpy(array) for name, array in np.load(UNIT_FOLDER / f"{kind}.npz").items()}
    return {name.removeprefix(f"{case}/"): array for name, array in loaded.items() if name.startswith(f"{case}/")}


def language_config(kind: str, case: str) -> LanguageConfig:
    facts = {key: value for key, value in CASES[kind][case].items() if key in LANGUAGE_KEYS}
    if "rope_scaling" in facts:
        facts["rope_scaling"] = RopeScaling.from_dict(facts["rope_scaling"], use_mla=True)
    return LanguageConfig(**facts)


def weights(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("w/"): value for name, value in recorded.items() if name.startswith("w/")}


@pytest.mark.parametrize("case", CASES["gate"])
def test_the_router_chooses_and_weighs_as_the_original(case: str) -> None:
    recorded = arrays("gate", case)
    router = Router(language_config("gate", case))
    bias = {"e_score_correction_bias": recorded["bias"]} if "bias" in recorded else {}
    router.load_state_dict({"weight": recorded["weight"], **bias})
    routing = router(recorded["x"])
    idx, order = routing.idx.sort(dim=-1)
    assert torch.equal(idx, recorded["topk_idx_sorted"].long())
    assert_close(routing.weights.gather(-1, order), recorded["topk_weight"], ROUTER_WEIGHTS)
    assert (routing.weights.dtype, routing.logits.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("case", CASES["moe"])
def test_the_moe_block_gives_the_recorded_sum(case: str) -> None:
    recorded = arrays("moe", case)
    moe, named = MoE(language_config("moe", case)), weights(recorded)
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        experts = [named.pop(f"experts.{e}.{matrix}.weight") for e in range(CASES["moe"][case]["n_routed_experts"])]
        named[f"experts.{matrix}"] = torch.stack(experts)
    moe.load_state_dict(named)
    assert_close(moe(recorded["x"]), recorded["y"], UNIT)
    assert_close(moe.shared_experts(recorded["x"]), recorded["shared"], UNIT)


def rope_config(facts: dict[str, Any]) -> LanguageConfig:
    kind = facts["class"].removeprefix("DeepseekV2").removesuffix("RotaryEmbedding")
    kinds = {"LinearScaling": "linear", "DynamicNTKScaling": "dynamic", "Yarn": "yarn"}
    scaling = None
    if kind:
        names = {field.name for field in dataclasses.fields(RopeScaling)}
        given = {key: value for key, value in facts.items() if key in names}
        scaling = RopeScaling(kinds[kind], facts["scaling_factor"], **given)
    return LanguageConfig(
        qk_rope_head_dim=facts["dim"],
        rope_theta=facts["base"],
        max_position_embeddings=facts["max_position_embeddings"],
        rope_scaling=scaling,
    )


@pytest.mark.parametrize("case", CASES["rope"])
def test_rotary_tables_are_the_recorded_ones(case: str) -> None:
    facts, recorded = CASES["rope"][case], arrays("rope", case)
    positions = torch.from_numpy(np.load(UNIT_FOLDER / "rope.npz")["positions"]).long()
    config = rope_config(facts)
    cos, sin = rope_tables(config, positions[None], facts["seq_len"])
    assert (cos.dtype, sin.dtype) == (torch.float32, torch.float32)
    assert_close(inverse_frequencies(config, facts["dim"], facts["seq_len"]), recorded["inv_freq"], UNIT)
    for bound, chosen in ((ROPE_NEAR, positions <= 600), (ROPE_FAR, positions > 600)):
        assert_close(cos[0, chosen], recorded["cos"][chosen], bound)
        assert_close(sin[0, chosen], recorded["sin"][chosen], bound)
    factor = latent_softmax_scale(config) / config.head_dim**-0.5
    assert factor == pytest.approx(facts["softmax_scale_factor"], rel=1e-12)


@pytest.mark.parametrize("kind", ("mla", "mha"))
def test_rotation_of_queries_and_keys_is_the_recorded_one(kind: str) -> None:
    recorded = arrays("rope", f"{kind}_apply")
    cos, sin = rope_tables(LanguageConfig(qk_rope_head_dim=16), recorded["position_ids"].long(), 5)
    for name in ("q", "k"):
        x = recorded[name].transpose(1, 2)
        rotated = apply_rope(deinterleave(x) if kind == "mla" else x, cos, sin)
        assert_close(rotated.transpose(1, 2), recorded[f"{name}_out"], UNIT)


@pytest.mark.parametrize("case, form", ATTENTION_FORMS)
def test_attention_in_pieces_and_whole_gives_the_recorded_outputs_and_cache(case: str, form: str) -> None:
    recorded, config = arrays("attention", case), language_config("attention", case)
    attention = LatentAttention(config) if config.use_mla else Attention(config)
    attention.load_state_dict(weights(recorded))
    if config.use_mla:
        attention.absorbed = form == "absorbed"
        assert attention.scale == pytest.approx(CASES["attention"][case]["softmax_scale"], rel=1e-12)
    x, mask, positions = recorded["x"], recorded["attention_mask"], recorded["position_ids"].long()
    past: tuple[Tensor, ...] = ()
    for start, end in ((0, 7), (7, 8), (8, 11), (0, 11)):
        past = past if start else ()
        rope = rope_tables(config, positions[:, start:end], end)
        y, new = attention(x[:, start:end], additive_mask(mask[:, :end], end - start, x.dtype), rope, past)
        past = append_cache(past, new)
        want = recorded["y_full_no_cache" if (start, end) == (0, 11) else f"y_{start}_{end}"]
        real = mask[:, start:end]
        assert y.isfinite().all()
        assert_close(y[real], want[real], UNIT, f"{start}:{end}")
    if config.use_mla:
        cache = past[0].split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)[::-1]
    else:
        cache = past
    for i, entry in enumerate(cache):
        entry = entry[:, :, None] if config.use_mla else entry
        assert_close(entry[mask], recorded[f"cache{i}"].transpose(1, 2)[mask], UNIT)


@pytest.mark.parametrize("case", CASES["projector"])
def test_the_projector_unfolds_and_projects_as_recorded(case: str) -> None:
    recorded = arrays("projector", case)
    facts = {key: value for key, value in CASES["projector"][case].items() if key != "side"}
    projector = Projector(ProjectorConfig(**facts))
    projector.load_state_dict(weights(recorded))
    assert torch.equal(unfold_blocks(recorded["x"], facts["downsample_ratio"]), recorded["unfolded"])
    assert_close(projector(recorded["x"]), recorded["y"], UNIT)


@pytest.mark.parametrize("case", ("rms_1e-6", "rms_1e-5"))
def test_rms_norm_gives_the_recorded_values_in_float32_and_bfloat16(case: str) -> None:
    recorded = arrays("norms", case)
    x = torch.from_numpy(np.load(UNIT_FOLDER / "norms.npz")["x"])
    norm = RMSNorm(x.shape[-1], CASES["norms"][case]["eps"])
    norm.load_state_dict({"weight": recorded["weight"]})
    assert_close(norm(x), recorded["y"], UNIT)
    assert_close(norm.bfloat16()(x.bfloat16()).float(), recorded["y_bf16"], BFLOAT16_STEP)


def test_outer_norms_follow_the_config_and_the_inner_ones_of_latent_attention_do_not() -> None:
    config = LanguageConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, q_lora_rank=4,
        kv_lora_rank=4, rms_norm_eps=1e-3,
    )  # fmt: skip
    eps = {name: m.eps for name, m in Decoder(config).named_modules() if isinstance(m, RMSNorm)}
    inner = {f"layers.0.self_attn.{name}_layernorm": 1e-6 for name in ("q_a", "kv_a")}
    outer = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    assert eps == inner | dict.fromkeys(outer, 1e-3)


def test_layer_norm_gives_the_recorded_values() -> None:
    recorded = arrays("norms", "layernorm_1e-6")
    x = torch.from_numpy(np.load(UNIT_FOLDER / "norms.npz")["x"])
    assert_close(F.layer_norm(x, x.shape[-1:], recorded["weight"], recorded["bias"], 1e-6), recorded["y"], UNIT)


@pytest.mark.parametrize(
    "name, function",
    (
        ("gelu_tanh_vision", lambda x: F.gelu(x, approximate="tanh")),
        ("gelu_erf_projector", F.gelu),
        ("silu_language", F.silu),
    ),
)
def test_activations_are_the_recorded_ones(name: str, function: Any) -> None:
    recorded = {key: torch.from_numpy(array) for key, array in np.load(UNIT_FOLDER / "norms.npz").items()}
    assert_close(function(recorded["act_x"]), recorded[name], UNIT)

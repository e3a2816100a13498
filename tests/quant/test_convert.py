"""GPTQ-format checkpoints of other programs: converted with every weight bit for bit, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import GOLDENS
from tests.quant.gptq_files import GptqFile, gptq_file
from vl2.config import load_config
from vl2.errors import VL2Error
from vl2.model.checkpoint import iter_tensors
from vl2.quant.checkpoint import QuantizedCheckpoint
from vl2.quant.convert import convert_checkpoint
from vl2.quant.linears import expert_layer, is_router, matrices

TINY = GOLDENS / "tiny-mini"
LAYERS = "language.model.layers."
Q, DOWN = LAYERS + "0.self_attn.q_proj", LAYERS + "0.mlp.down_proj"  # 96 and 176 inputs
EXPERT = LAYERS + "2.mlp.experts.5.down_proj"


def linears(folder: Path) -> list[str]:
    """What GPTQModel and AutoRound quantize by default: the decoder's Linears but the routers."""
    return [module for module in matrices(load_config(folder)) if module.startswith(LAYERS) and not is_router(module)]


def experts(layer: int) -> list[str]:
    return [module for module in matrices(load_config(TINY)) if expert_layer(module) == layer]


@pytest.fixture
def one(tmp_path: Path) -> Callable[..., GptqFile]:
    """`one(modules)`: a GPTQ-format tiny-mini with these modules quantized."""
    return lambda modules=(Q,), **how: gptq_file(TINY, tmp_path / "gptq", list(modules), **how)


def converted(file: GptqFile) -> tuple[QuantizedCheckpoint, dict]:
    out = file.folder.with_name(file.folder.name + "-converted")
    made = convert_checkpoint(file.save(), out)
    return QuantizedCheckpoint(out), made


def check_weights(file: GptqFile, made: QuantizedCheckpoint, source: Path = TINY) -> None:
    """Quantized ones by the formula, all others as the source has them, none more."""
    read, originals = dict(made.iter_dequantized()), dict(iter_tensors(source))
    assert read.keys() == originals.keys()
    for name, original in originals.items():
        want = file.weights.get(name.removesuffix(".weight"), original) if name.endswith(".weight") else original
        assert read[name].dtype == want.dtype and torch.equal(read[name], want), name


@pytest.mark.parametrize("checkpoint, bits, v2", [
    ("tiny-mini", 4, False), ("tiny-mini", 8, True), ("small-mini", 4, True), ("base-mini", 8, False),
])  # fmt: skip
def test_every_weight_of_a_converted_model_is_bit_for_bit_the_file_s(
    tmp_path: Path, checkpoint: str, bits: int, v2: bool
) -> None:
    source = GOLDENS / checkpoint
    file = gptq_file(source, tmp_path / "gptq", linears(source), bits, 32, v2)
    made, facts = converted(file)
    check_weights(file, made, source)
    assert facts["matrices"] == len(linears(source)) and {form.bits for form in made.forms.values() if form} == {bits}


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(bits=st.sampled_from([4, 8]), group=st.sampled_from([-1, 16, 32, 48, 64, 96, 128]), v2=st.booleans(),
       signs=st.booleans(), g_idx=st.booleans(), seed=st.integers(0, 2**32))
def test_any_bits_group_zero_convention_and_sign_of_scales_keeps_the_weights(
    tmp_path_factory: pytest.TempPathFactory, bits: int, group: int, v2: bool, signs: bool, g_idx: bool, seed: int
) -> None:
    """96, 64, 128 and 176 inputs: groups that divide them, leave a rest, or are longer than they are."""
    folder = tmp_path_factory.mktemp("property") / "gptq"
    file = gptq_file(TINY, folder, [Q, DOWN, *experts(2)], bits, group, v2, signs=signs and bits == 4, seed=seed)
    if not g_idx:
        file.tensors = {name: tensor for name, tensor in file.tensors.items() if not name.endswith("g_idx")}
    made, _ = converted(file)
    check_weights(file, made)
    assert all(bool((made.quantized(module).scales > 0).all()) for module in file.weights)


def test_codes_are_kept_not_made_anew(one) -> None:
    file = one()
    scales = file.tensors[Q + ".scales"]
    made, _ = converted(file)
    got = made.quantized(Q)
    assert torch.equal(got.scales, scales.T) and got.bits == 4
    assert torch.equal(got.codes * scales.T.float().repeat_interleave(32, dim=1), file.weights[Q])
    words = made.folder / "model-00003-of-00011.safetensors"
    assert torch.equal(_tensor(words, Q + ".weight_packed"), file.tensors[Q + ".qweight"].T)


def _tensor(path: Path, name: str) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(path)[name]


def test_a_last_group_that_is_not_full_is_split_with_the_others(one) -> None:
    """As full-size Tiny's dense layer: 6848 inputs in groups of 128."""
    made, facts = converted(one([DOWN], group=64))
    assert made.forms[DOWN].group_size == 16 and facts["split_groups"] == [DOWN]


def test_negative_scales_change_sign_and_take_8_bits_only_where_4_cannot_hold_the_code(one) -> None:
    """AutoRound's full-range grid puts the extreme weight at −8 under a scale of either sign."""
    file = one([Q, *experts(2)])
    file.tensors[Q + ".qweight"] |= 0x11111111  # no code −8
    for module in (Q, EXPERT):
        file.tensors[module + ".scales"] *= -1
    file.weights = {}
    made, facts = converted(file)
    assert made.forms[Q].bits == 4 and bool((made.quantized(Q).scales > 0).all())
    assert sorted(facts["widened"]) == sorted(experts(2)), "experts of a layer stay in one form"
    assert made.quantized(EXPERT).codes.max() == 8 and made.forms[EXPERT].bits == 8


def test_a_scale_of_zero_becomes_one_over_codes_of_zero(one) -> None:
    file = one()
    file.tensors[Q + ".scales"][1, 3] = 0
    file.weights[Q][3, 32:64] = 0
    made, _ = converted(file)
    check_weights(file, made)
    assert made.quantized(Q).scales[3, 1] == 1


def test_biases_that_older_writers_add_are_left_out_when_zero_and_told(one) -> None:
    file = one()
    file.tensors[Q + ".bias"] = torch.zeros(96)
    made, facts = converted(file)
    assert facts["zero_biases"] == [Q + ".bias"] and Q + ".bias" not in made.entries


def test_a_reordered_flag_without_reordered_inputs_is_converted(one) -> None:
    file = one()
    file.values["desc_act"] = True
    made, _ = converted(file)
    check_weights(file, made)


def test_overrides_of_single_modules_are_followed(one, tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: experts in 4 bits, attention in 8, the rest left in floating point."""
    file, other = one(experts(1)), gptq_file(TINY, tmp_path / "other", [Q], 8, 96)
    file.weights |= other.weights
    file.tensors.pop(Q + ".weight")
    file.tensors |= {name: tensor for name, tensor in other.tensors.items() if name.startswith(Q)}
    file.values["dynamic"] = {r"+:.*q_proj": {"bits": 8, "group_size": 96}, r"-:.*shared.*": {}}
    made, _ = converted(file)
    check_weights(file, made)
    assert made.forms[Q].bits == 8


def test_the_settings_of_older_writers_are_read_from_their_own_file(one) -> None:
    file = one()
    folder = file.save()
    config = json.loads((folder / "config.json").read_text())
    values = config.pop("quantization_config")
    values.pop("quant_method")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(values))
    convert_checkpoint(folder, folder.with_name("out"))
    check_weights(file, QuantizedCheckpoint(folder.with_name("out")))


def test_autoround_s_settings_are_read_and_named(one) -> None:
    file = one()
    for key in ("pack_dtype", "checkpoint_format", "meta", "lm_head"):
        file.values.pop(key)
    file.values |= {"autoround_version": "0.4.3", "block_name_to_quantize": "language.model.layers", "iters": 1000,
                    "data_type": "int", "extra_config": {LAYERS + "0.mlp.up_proj": {"bits": 16}}}
    made, facts = converted(file)
    check_weights(file, made)
    assert facts["made_by"] == "auto_round:0.4.3"


def test_the_folder_says_where_the_codes_come_from(one) -> None:
    made, _ = converted(one())
    facts = json.loads((made.folder / "quantization.json").read_text())
    assert facts["recipe"]["name"] == "gptq-int4-g32" and facts["converted"]["made_by"] == "gptqmodel:5.7.0"
    card = (made.folder / "README.md").read_text()
    assert "codes kept" in card and "Not known" in card and "gptqmodel:5.7.0" in card
    assert {path.suffix for path in made.folder.iterdir()} == {".json", ".md", ".safetensors"}
    assert not (made.folder / "job.json").exists()


def test_an_interrupted_conversion_goes_on_with_the_same_bytes(one) -> None:
    folder = one(linears(TINY)).save()
    convert_checkpoint(folder, folder.with_name("whole"))

    class Killed(Exception):
        pass

    def kill(part: str, done: int, total: int) -> None:
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        convert_checkpoint(folder, folder.with_name("resumed"), kill)
    partial = folder.with_name("resumed.partial")
    times = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    convert_checkpoint(folder, folder.with_name("resumed"))
    for path in folder.with_name("whole").iterdir():
        assert path.read_bytes() == folder.with_name("resumed").joinpath(path.name).read_bytes(), path.name
    assert len(times) == 4 and not partial.exists()
    assert all(folder.with_name("resumed").joinpath(name).stat().st_mtime_ns == time for name, time in times.items())
    with pytest.raises(VL2Error, match="exists"):
        convert_checkpoint(folder, folder.with_name("resumed"))


@pytest.mark.parametrize("key, value, named", [
    ("sym", False, "sym"), ("bits", 3, "bits"), ("quant_method", "awq", "awq"),
    ("checkpoint_format", "marlin", "marlin"),
    ("quant_method", "auto-round", "auto_gptq"), ("pack_dtype", "int16", "pack_dtype"), ("group_size", 0, "group_size"),
    ("hyb_act", True, "hyb_act"), ("adapter", {"name": "lora"}, "adapter"), ("rotation", "hadamard", "rotation"),
    ("new_key", 1, "new_key"), ("dynamic", {"+:.*": {"sym": False}}, "sym"), ("act_bits", 8, "act_bits"),
    ("bits", 8, "bits"), ("group_size", 48, "group_size"),
])  # fmt: skip
def test_settings_that_are_not_converted_are_refused_by_name(one, key: str, value: object, named: str) -> None:
    file = one()
    file.values[key] = value
    with pytest.raises(VL2Error) as refused:
        converted(file)
    assert named in str(refused.value)


@pytest.mark.parametrize("key", ["bits", "group_size", "sym"])
def test_settings_that_lack_how_codes_are_packed_are_refused(one, key: str) -> None:
    file = one()
    file.values.pop(key)
    with pytest.raises(VL2Error, match=key):
        converted(file)


def asymmetric(file: GptqFile) -> None:
    file.tensors[Q + ".qzeros"][0, 0] ^= 0x30


def other_zero_convention(file: GptqFile) -> None:
    file.values["checkpoint_format"] = "gptq_v2"


def reordered(file: GptqFile) -> None:
    file.tensors[Q + ".g_idx"] = file.tensors[Q + ".g_idx"].flip(0)


def order_unknown(file: GptqFile) -> None:
    file.values["desc_act"] = True
    file.tensors.pop(Q + ".g_idx")


def missing(file: GptqFile) -> None:
    file.tensors.pop(Q + ".qzeros")


def left_over(file: GptqFile) -> None:
    file.tensors["language.model.layers.9.mlp.up_proj.qweight"] = torch.zeros(1, 1, dtype=torch.int32)


def real_bias(file: GptqFile) -> None:
    file.tensors[Q + ".bias"] = torch.ones(96)


def both(file: GptqFile) -> None:
    file.tensors[Q + ".weight"] = file.weights[Q]


def misshapen(file: GptqFile) -> None:
    file.tensors[Q + ".qweight"] = file.tensors[Q + ".qweight"][:, :-1].contiguous()


def wrong_type(file: GptqFile) -> None:
    file.tensors[Q + ".qweight"] = file.tensors[Q + ".qweight"].long()


def not_finite(file: GptqFile) -> None:
    file.tensors[Q + ".scales"][0, 0] = float("nan")


@pytest.mark.parametrize("spoil, named", [
    (asymmetric, "zero points"), (other_zero_convention, "format `gptq`"), (reordered, "desc_act"),
    (order_unknown, "g_idx` is missing"), (missing, "q_proj.qzeros"), (left_over, "layers.9"),
    (real_bias, "q_proj.bias"), (both, "q_proj.weight"), (misshapen, r"\[12, 95\]"),
    (wrong_type, "I64"), (not_finite, "q_proj.scales"),
])  # fmt: skip
def test_tensors_that_are_not_converted_are_refused_by_name(one, spoil, named: str) -> None:
    file = one()
    spoil(file)
    with pytest.raises(VL2Error, match=named):
        converted(file)
    assert not list(file.folder.parent.glob("*converted/*"))


@pytest.mark.parametrize("modules, named", [
    ([LAYERS + "1.mlp.gate"], "router"), ([EXPERT], "experts of layer 2"), ([], "no packed matrix"),
])  # fmt: skip
def test_modules_that_no_consumer_takes_are_refused(one, modules: list[str], named: str) -> None:
    with pytest.raises(VL2Error, match=named):
        converted(one(modules, bits=8, group=16))


def test_8_bits_have_no_room_for_the_sign_of_a_scale_over_their_smallest_code(one) -> None:
    with pytest.raises(VL2Error, match="negative scale over a code -128"):
        converted(one(bits=8, signs=True))


def test_a_folder_that_is_not_quantized_is_refused() -> None:
    with pytest.raises(VL2Error, match="no `quantization_config`"):
        convert_checkpoint(TINY, TINY.with_name("never"))

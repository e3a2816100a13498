"""Our files in other readers: the compressed-tensors package, and transformers with the language model of Small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vl2.json_file import read_json
from vl2.quant.checkpoint import PACKED, SCALE, SHAPE, QuantizedCheckpoint
from vl2.quant.quantizer import QuantizeOptions, quantize_checkpoint
from vl2.quant.recipe import OuterParts
from vl2.quant.shard import write_shard
from vl2.safetensors_file import checkpoint_entries


@pytest.fixture(scope="module", params=["int4", "int8"])
def small(request: pytest.FixtureRequest, goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("interchange") / request.param
    outer = OuterParts(vision="int8", lm_head="int8")
    return quantize_checkpoint(goldens / "small-mini", out, QuantizeOptions(recipe=request.param, outer=outer))


def test_the_safetensors_package_reads_every_shard(small: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    made = QuantizedCheckpoint(small)
    count = 0
    for path in sorted(small.glob("*.safetensors")):
        for name, tensor in safetensors.load_file(path).items():
            assert tuple(tensor.shape) == made.entries[name].shape
            count += 1
    assert count == len(made.entries)


def test_the_compressed_tensors_package_dequantizes_to_our_weights(small: Path) -> None:
    """It computes in the scales' dtype: with them in float32 as ours exactly, in float16 as ours rounded to it."""
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    from compressed_tensors.compressors import PackedQuantizationCompressor

    made = QuantizedCheckpoint(small)
    tensors = {k: v for path in small.glob("*.safetensors") for k, v in safetensors.load_file(path).items()}
    quantized = [module for module, form in made.forms.items() if form is not None]
    for module in quantized:
        form = made.forms[module]
        strategy = {"strategy": "channel"} if form.group_size is None else {
            "strategy": "group", "group_size": form.group_size}
        arguments = quantization.QuantizationArgs(num_bits=form.bits, symmetric=True, **strategy)
        scheme = quantization.QuantizationScheme(targets=[module], weights=arguments)
        local = {suffix[1:]: tensors[module + suffix] for suffix in (PACKED, SCALE, SHAPE)}
        ours = made.quantized(module).dequantize()
        half = PackedQuantizationCompressor.decompress(local, scheme)["weight"]
        assert torch.equal(half, ours.half()), module
        local["weight_scale"] = local["weight_scale"].float()
        assert torch.equal(PackedQuantizationCompressor.decompress(local, scheme)["weight"], ours), module
    assert len(quantized) > 150


@pytest.mark.parametrize("dequantize", [True, False])
def test_transformers_loads_the_language_model_with_our_weights(small: Path, tmp_path: Path, dequantize: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    folder = language_model_alone(small, tmp_path / "language")
    model = transformers.DeepseekV2ForCausalLM.from_pretrained(
        folder, dtype=torch.float32,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True) if dequantize else None,
    )  # fmt: skip
    made = QuantizedCheckpoint(small).tensors
    hidden = torch.randn(1, 9, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(inputs_embeds=hidden)  # modules that stay compressed are decompressed at the first call
    loaded = model.state_dict()
    assert torch.equal(loaded["lm_head.weight"], made["language.lm_head.weight"])
    for l in range(4):
        layer, ours = f"model.layers.{l}.", f"language.model.layers.{l}."
        for name in ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.o_proj"):
            assert torch.equal(loaded[f"{layer}{name}.weight"], made[f"{ours}{name}.weight"]), (l, name)
    for e in range(16):
        prefix = f"language.model.layers.2.mlp.experts.{e}."
        want = torch.cat([made[prefix + "gate_proj.weight"], made[prefix + "up_proj.weight"]])
        assert torch.equal(loaded["model.layers.2.mlp.experts.gate_up_proj"][e], want), e
        assert torch.equal(loaded["model.layers.2.mlp.experts.down_proj"][e], made[prefix + "down_proj.weight"]), e


def language_model_alone(folder: Path, out: Path) -> Path:
    """The language part of a quantized checkpoint as a DeepseekV2 folder: names without `language.`, its config."""
    out.mkdir()
    entries = checkpoint_entries(folder)
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    tensors = {k: v for path in folder.glob("*.safetensors") for k, v in safetensors.load_file(path).items()}
    assert tensors.keys() == entries.keys()
    kept = {k.removeprefix("language."): v for k, v in tensors.items() if k.startswith("language.")}
    write_shard(out / "model.safetensors", kept)
    config = read_json(folder / "config.json")
    language = {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], **config["language_config"]}
    defaults = {"q_lora_rank": None, "first_k_dense_replace": 1, "rms_norm_eps": 1e-6}
    language = {**defaults, **language, "quantization_config": config["quantization_config"]}
    (out / "config.json").write_text(json.dumps(language))
    return out

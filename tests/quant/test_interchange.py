"""Our files in other readers: the safetensors and the compressed-tensors package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vl2.quant.checkpoint import PACKED, SCALE, SHAPE, QuantizedCheckpoint
from vl2.quant.quantizer import QuantizeOptions, quantize_checkpoint
from vl2.quant.recipe import OuterParts


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

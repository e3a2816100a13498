"""Real builds in TensorRT-RTX with the plugins of plugins/tensorrt, on a machine without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import GOLDENS, NANO
from tests.plugins.tensorrt.conftest import LINEAR, LINEAR_INPUTS, published_decoder
from vl2.errors import VL2Error
from vl2.manifest import read_manifest
from vl2.plugins.tensorrt.build import EngineJob, _capability, _config, build_apart
from vl2.plugins.tensorrt.engines import EngineSizes, profiles
from vl2.plugins.tensorrt.flavour import load_tensorrt, logger_of

CAPABILITIES = ("8.6", "8.9", "12.0")
TOKENS = ({"x": ((1, 128), (4, 128), (512, 128))},)


def refusal(rtx: str, path: str, ranges: tuple = TOKENS) -> str:
    with pytest.raises(VL2Error) as caught:
        build_apart(EngineJob(path, f"{path}.engine", rtx, ("8.6",), ranges))
    assert not Path(f"{path}.engine").exists() and caught.value.hint
    return caught.value.message


def test_a_plugin_builds_and_its_weights_stay_outside(rtx: str, one_node) -> None:
    path = one_node("Linear", LINEAR, LINEAR_INPUTS)
    facts = build_apart(EngineJob(path, f"{path}.engine", rtx, CAPABILITIES, TOKENS))
    assert facts.size_bytes == Path(f"{path}.engine").stat().st_size < 1 << 20
    assert 0 < facts.peak_rss_bytes < 1 << 30 and facts.tensorrt.startswith("1.7")


@pytest.mark.parametrize("folder, scheme", [(GOLDENS / "tiny-mini", "fp16"), (GOLDENS / "small-mini", "int4"),
                                            (NANO, "fp16")])  # fmt: skip
def test_graphs_of_both_attentions_and_nano_build_for_three_generations(
    rtx: str, quantized_of, bundle_of, tmp_path: Path, folder: Path, scheme: str
) -> None:
    folder = folder if scheme == "fp16" else quantized_of(folder, scheme)
    bundle = bundle_of(folder, "fp16" if scheme == "fp16" else None, "trt")
    for graph, facts in read_manifest(bundle).graphs.items():
        ranges = profiles(graph, facts, EngineSizes(context=512, prefill_chunk=128, tiles=4))
        job = EngineJob(str(bundle / facts.file), str(tmp_path / graph), rtx, CAPABILITIES, ranges)
        assert build_apart(job).peak_rss_bytes < 1 << 30


@pytest.mark.parametrize("variant", ["tiny", "small"])
@pytest.mark.parametrize("scheme", ["int4", "fp16"])
def test_a_layer_of_published_size_builds_for_three_generations(rtx: str, tmp_path, variant: str, scheme: str) -> None:
    """A dense and a MoE layer of Tiny (plain attention) and Small (over latents). Measured: 2.5 to 6.0 MB, of three
    generations together as of one, peaks of 0.24 to 0.26 GB, docs/engines.md."""
    facts = build_apart(replace(published_decoder(tmp_path, variant, scheme, rtx), capabilities=CAPABILITIES))
    assert facts.peak_rss_bytes < 0.4e9 and 2e6 < facts.size_bytes < 9e6


def test_an_int8_tower_takes_about_half_of_the_engine_and_of_the_memory_beyond_tensorrt(rtx: str) -> None:
    """Two blocks of the published width, 61 MB of float16 matrices; TensorRT keeps codes as codes."""
    from benchmarks.engine_build import build, shortened, storing_for

    config = shortened("tiny", 1, 2)
    half, codes = (build("vision", config, storing_for(config, "fp16", int8), "8.6") for int8 in (False, True))
    assert codes["size_bytes"] < 0.65 * half["size_bytes"]
    assert half["peak_rss_bytes"] - codes["peak_rss_bytes"] > half["weight_bytes"] - codes["weight_bytes"] > 25e6


def test_a_wrong_dtype_is_named_with_its_input(rtx: str, one_node) -> None:
    inputs = {**LINEAR_INPUTS, "weight_scale": ("float32", [64, 4])}
    told = refusal(rtx, one_node("Linear", LINEAR, inputs))
    assert "input 2 of vl2::Linear, `weight_scale`, is float32, expected float16" in told


def test_a_group_size_that_no_kernel_reads_is_named(rtx: str, one_node) -> None:
    told = refusal(rtx, one_node("Linear", {**LINEAR, "group_size": 24}, LINEAR_INPUTS))
    assert "groups of 24" in told


def test_a_missing_attribute_is_named(rtx: str, one_node) -> None:
    given = {name: value for name, value in LINEAR.items() if name != "group_size"}
    assert "no attribute `group_size`" in refusal(rtx, one_node("Linear", given, LINEAR_INPUTS))


def test_a_missing_plugin_is_named(rtx: str, tmp_path: Path) -> None:
    """As a bundle of a later vl2 would have it."""
    from onnx import TensorProto, helper, save

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [4]) for name in ("x", "y")]
    node = helper.make_node("Sparse", ["x"], ["y"], domain="vl2", plugin_namespace="vl2", plugin_version="1")
    graph = helper.make_graph([node], "one", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("vl2", 1)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "one.onnx")
    assert "Sparse" in refusal(rtx, str(tmp_path / "one.onnx"), ())


def test_a_gpu_that_tensorrt_rtx_does_not_build_for_is_named(rtx: str, one_node) -> None:
    path = one_node("Linear", LINEAR, LINEAR_INPUTS)
    with pytest.raises(VL2Error, match="builds no engine for compute capability 8.7"):
        build_apart(EngineJob(path, f"{path}.engine", rtx, ("8.7",), TOKENS))


def test_a_gpu_of_this_machine_that_has_no_name_is_left_to_tensorrt_rtx(rtx: str) -> None:
    """An H200 has 9.0: whether it is built for is TensorRT-RTX's to say."""
    kinds = load_tensorrt(rtx).ComputeCapability
    asked = [_capability(load_tensorrt(rtx), name, on_this_gpu=True) for name in ("9.0", "8.9")]
    assert asked == [kinds.CURRENT, kinds.SM89]


def test_a_build_asks_for_memory_that_a_graph_can_be_captured_over(rtx: str) -> None:
    trt = load_tensorrt(rtx)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    made = _config(trt, builder, EngineJob("one.onnx", "one.engine", rtx, ("8.9",)), logger_of(trt))
    assert made.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def test_a_builder_that_dies_is_told_with_what_it_said(rtx: str, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    assert "bad.onnx" in refusal(rtx, str(tmp_path / "bad.onnx"), ())

"""The `trt` lowering: parity with PyTorch by emulation, only what TensorRT 10.3 parses, weights bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from vl2.config import load_config
from vl2.errors import VL2Error
from vl2.export import ExportOptions, export_checkpoint, plan_export
from vl2.export.checkpoint import open_checkpoint
from vl2.export.choice import choose_storing
from vl2.export.engine_emulation import dequantize, map_weights
from vl2.export.engine_graph import build_engine_graph
from vl2.export.engine_storage import row_storage
from vl2.export.passes.halve import Precision, halve
from vl2.export.passes.store_weights import DataFile
from vl2.export.schemes import FLOAT16, FLOAT32, Storage
from vl2.export.storing import COLUMNS, FLOATS, TRT, Storing
from vl2.manifest import Manifest, read_manifest
from vl2.model.checkpoint import iter_tensors
from vl2.plugins.tensorrt.operators import OPERATORS
from vl2.quantization import Form
from vl2.runtime import open_bundle

# Standard operators that the parser of TensorRT 10.3 imports (onnx-tensorrt, docs/operators.md of 10.3), as far as our
# graphs use them; what comes new has to be looked up there first.
PARSED = {"Add", "Cast", "Concat", "Constant", "Conv", "Cos", "DequantizeLinear", "Flatten", "Gather", "Gelu", "Gemm",
          "LayerNormalization", "MatMul", "Mul", "Pad", "Pow", "Reciprocal", "ReduceMean", "Reshape", "Shape",
          "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Transpose", "Unsqueeze"}  # fmt: skip
NAMES = {"FLOAT": "float32", "FLOAT16": "float16", "INT8": "int8", "INT64": "int64"}
PLUGINS = {"Attention", "Experts", "LatentAttention", "Linear"}


@pytest.fixture(scope="module", params=[("tiny-mini", "fp16"), ("small-mini", "int4")], ids="-".join)
def exported(request, goldens: Path, quantized_of, bundle_of) -> tuple[Path, Path, Manifest]:
    """Checkpoint, bundle, manifest; one with plain and one with latent attention."""
    name, scheme = request.param
    folder = goldens / name if scheme == "fp16" else quantized_of(goldens / name, scheme)
    bundle = bundle_of(folder, "fp16" if scheme == "fp16" else None, "trt")
    return folder, bundle, read_manifest(bundle)


def graphs_of(bundle: Path, manifest: Manifest) -> dict[str, onnx.GraphProto]:
    return {name: onnx.load(bundle / graph.file, load_external_data=False).graph
            for name, graph in manifest.graphs.items()}  # fmt: skip


def test_the_emulated_graphs_agree_with_pytorch_within_half_precision(exported) -> None:
    """Measured: 3e-3 to 2e-2 in the minis (one rounding to float16 is 5e-4), 3e-2 in vl2-nano; float32: 5e-6."""
    verify = exported[2].verify
    assert verify["status"] == "passed" and verify["tokens_equal"] and verify["activations"] == "float16"
    figures = [verify[key] for key in ("features_difference", "logits_difference", "chunked_difference")]
    assert 1e-4 < max(figures) < 2e-2


def test_graphs_hold_only_what_tensorrt_10_3_parses(exported) -> None:
    for graph in graphs_of(exported[1], exported[2]).values():
        for node in graph.node:
            assert node.op_type in (PLUGINS if node.domain == "vl2" else PARSED), f"{node.domain}::{node.op_type}"
    model = onnx.load(exported[1] / "decoder.onnx", load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20, "vl2": 1}


def test_every_plugin_names_its_namespace_and_version(exported) -> None:
    nodes = [node for node in graphs_of(exported[1], exported[2])["decoder"].node if node.domain == "vl2"]
    for node in nodes:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (given["plugin_namespace"], given["plugin_version"]) == (b"vl2", b"1"), node.name
        assert "" not in node.input, f"{node.name} has an optional input"


def test_every_weight_of_the_decoder_is_an_input_and_lies_in_the_weight_file(exported) -> None:
    bundle, manifest = exported[1:]
    decoder, ports = graphs_of(bundle, manifest)["decoder"], {port.name for port in manifest.graphs["decoder"].inputs}
    weights = map_weights(bundle / manifest.graphs["decoder"].data_file)
    assert [value.name for value in decoder.input if value.name not in ports] == list(weights)
    assert all(np.prod(tensor.dims) <= 128 for tensor in decoder.initializer), "a weight is left in the graph"
    assert (bundle / "decoder.onnx").stat().st_size < 100_000


def check_plugin_inputs(graph: ir.Graph) -> None:
    for node in graph:
        if node.domain == "vl2":
            given = {name: a.value for name, a in node.attributes.items()}
            dtypes = [NAMES[value.dtype.name] for value in node.inputs]
            OPERATORS[node.op_type].check_types(given, dtypes)
            OPERATORS[node.op_type].check_attributes(given)
        elif node.op_type == "Gemm" and node.inputs[1].name.endswith("mlp.gate.weight"):
            assert {value.dtype.name for value in node.inputs} == {"FLOAT"}, "the router is computed in float32"


def test_nodes_give_the_plugins_what_they_expect(exported) -> None:
    check_plugin_inputs(ir.load(exported[1] / "decoder.onnx").graph)


def test_the_correction_bias_of_base_stays_float32(goldens: Path) -> None:
    checkpoint = open_checkpoint(goldens / "base-mini")
    storing = choose_storing(checkpoint, ExportOptions(lowering="trt"))
    model, _ = build_engine_graph("decoder", checkpoint.config, DataFile("decoder.safetensors", storing))
    assert any(node.op_type == "Experts" for node in model.graph)
    check_plugin_inputs(model.graph)


def test_matrix_products_are_typed_float16_and_norms_float32(exported) -> None:
    graphs = graphs_of(exported[1], exported[2])
    for name, types in (("vision", {"MatMul": 10, "LayerNormalization": 1, "Softmax": 10}), ("decoder", {"Pow": 1})):
        found = {value.name: value.type.tensor_type.elem_type for value in graphs[name].value_info}
        for node in graphs[name].node:
            if node.op_type in types and node.output[0] in found:
                assert found[node.output[0]] == types[node.op_type], node.name


def test_stored_weights_are_the_checkpoints_bit_for_bit(exported) -> None:
    """Packed ones dequantize to the checkpoint's numbers exactly; floats are rounded to float16 once."""
    folder, bundle, manifest = exported
    weights = map_weights(bundle / manifest.graphs["decoder"].data_file)
    numbers = {name: tensor.float() for name, tensor in iter_tensors(folder)}
    layer = "language.layers.1.mlp.experts"
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        name = f"{layer}.{matrix}"
        packed = f"{name}.weight_packed" in weights
        if packed:
            columns = numbers[f"language.model.layers.1.mlp.experts.0.{matrix}.weight"].shape[1]
            scheme = "int4" if 2 * weights[f"{name}.weight_packed"].shape[-1] == columns else "int8"
            got = dequantize(weights[f"{name}.weight_packed"], weights[f"{name}.weight_scale"], scheme)
        else:
            got = torch.from_numpy(np.array(weights[name])).float()
        for expert, rows in enumerate(got):
            wanted = numbers[f"language.model.layers.1.mlp.experts.{expert}.{matrix}.weight"]
            assert torch.equal(rows, wanted if packed else wanted.half().float()), f"{name} {expert}"


def test_int8_matrices_of_the_tower_stay_the_checkpoints_codes_and_scales(exported) -> None:
    """Codes [K, N] times a scale a column, rounded to float16 once: what a float16 tower of them would hold."""
    folder, bundle, manifest = exported
    graph = ir.load(bundle / "vision.onnx").graph
    found = [node for node in graph if node.op_type == "DequantizeLinear"]
    quantized = manifest.quantization is not None
    blocks = load_config(folder).vision_config.layers
    assert len(found) == (4 * blocks if quantized else 0), "qkv, proj, fc1 and fc2 of every block"
    numbers = {name: tensor.float() for name, tensor in iter_tensors(folder)}
    for node in found:
        codes, scales = node.inputs
        assert (codes.dtype.name, scales.dtype.name, node.outputs[0].dtype.name) == ("INT8", "FLOAT16", "FLOAT16")
        assert codes.shape[1] == scales.shape[0] and node.attributes["axis"].value == 1
        wanted = numbers[f"{codes.name.removesuffix('.weight.transposed.weight_packed')}.weight"]
        got = codes.const_value.numpy().astype(np.float32) * scales.const_value.numpy().astype(np.float32)
        assert np.array_equal(got.T, wanted.numpy()), codes.name
    held = {value.name: value.dtype.name for value in graph.initializers.values() if len(value.shape) == 2}
    assert set(held.values()) == ({"INT8", "FLOAT16"} if quantized else {"FLOAT16"})


@pytest.mark.parametrize("form, scale, use", [
    (Form(8, None), FLOAT16, COLUMNS), (Form(8, 64), FLOAT16, COLUMNS), (Form(8, 32), FLOAT16, FLOATS),
    (Form(4, None), FLOAT16, FLOATS), (Form(8, None), FLOAT32, FLOATS),
])  # fmt: skip
def test_a_tower_of_other_forms_is_dequantized_to_float16(form: Form, scale: Storage, use: str) -> None:
    name = "vision.blocks.0.mlp.fc1.weight"
    storing = Storing("fp16", TRT, {name: (240, 64)}, {name: form}, {name: scale})
    assert storing.use_of(name) == use
    assert [part.size_bytes((240, 64), 1) for part in storing.parts_of(name)] == (
        [240 * 64, 2 * 240] if use == COLUMNS else [2 * 240 * 64])  # fmt: skip


def test_the_plan_foretells_the_sizes(exported) -> None:
    folder, _, manifest = exported
    assert plan_export(folder, ExportOptions(lowering="trt")).modules == manifest.modules


def test_a_trt_bundle_without_engines_is_refused_with_the_command_that_builds_them(exported) -> None:
    with pytest.raises(VL2Error, match="has the lowering `trt`") as caught:
        open_bundle(exported[1]).ask("What?")
    assert "vl2 engine" in caught.value.hint


def test_int4_rows_keep_the_low_nibble_first_in_offset_binary() -> None:
    codes = torch.tensor([[-8, 7, 0, 1, -1, 2, 3, -3] * 2], dtype=torch.int8)
    packed, scale = row_storage("x", (1, 16), Form(4, 16), FLOAT16)
    stored = packed.encode(codes)
    assert stored.shape == packed.shape_of((1, 16), 1) == (1, 8) and stored[0, :2].tolist() == [0xF0, 0x98]
    back = dequantize(stored.view(torch.int8).numpy(), scale.encode(torch.ones(1, 1)).numpy(), "int4")
    assert torch.equal(back, codes.float())


@pytest.mark.parametrize("shape, form, scale, told", [
    ((8, 20), Form(4, None), FLOAT16, "rows of 20 codes of 4 bits"),
    ((8, 48), Form(4, 24), FLOAT16, "in groups of 24"),
    ((8, 64), Form(8, 8), FLOAT16, "in groups of 8"),
    ((8, 64), Form(4, 32), FLOAT32, "scales of more than 16 bits"),
])  # fmt: skip
def test_matrices_that_the_kernels_cannot_read_are_refused_by_name(shape, form, scale, told) -> None:
    with pytest.raises(VL2Error, match=f"`a.b`.*{told}"):
        row_storage("a.b", shape, form, scale)


@pytest.mark.parametrize("options, told", [
    (ExportOptions("fp32", lowering="trt"), "the scheme `fp32` was asked for"),
    (ExportOptions(lowering="trt", kv_cache="int8"), "whose caches are fp16"),
    (ExportOptions(lowering="trt", mode="fast"), "which has none"),
])  # fmt: skip
def test_options_that_engines_do_not_have_are_refused(goldens: Path, options: ExportOptions, told: str) -> None:
    with pytest.raises(VL2Error, match=told):
        export_checkpoint(goldens / "tiny-mini", goldens.parent / "never-written", options)


def small_graph() -> ir.Graph:
    """y = x · w + b, then y + x: a product, its bias and a residual sum."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 20]>
        g (float[2, 4] x) => (float[2, 4] z) <float16[4, 4] w = {0}, float[4] b = {0}>
        { p = MatMul(x, w) y = Add(p, b) z = Add(y, x) }""".replace("{0}", "{" + ",".join(["0"] * 16) + "}", 1)
                                    .replace("{0}", "{0,0,0,0}"))  # fmt: skip
    model = onnx.shape_inference.infer_shapes(model)
    return ir.from_proto(model).graph


def test_halving_casts_products_and_biases_and_leaves_residual_sums_wide() -> None:
    graph = small_graph()
    halve(graph, Precision(frozenset({"MatMul"}), frozenset({"Add"})))
    types = {value.name: value.dtype.name for node in graph for value in node.outputs}
    assert (types["p"], types["y"], types["z"]) == ("FLOAT16", "FLOAT16", "FLOAT")
    assert sum(node.op_type == "Cast" for node in graph) == 3  # x and b to half, y back
    assert graph.outputs[0].dtype == ir.DataType.FLOAT

"""What a bundle holds: its files, weights, nodes and manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from vl2.config import load_config
from vl2.export import ExportOptions, plan_export
from vl2.export.graphs import declare_graphs
from vl2.file_hashes import sha256_of
from vl2.manifest import MANIFEST_NAME, Manifest, check_files, read_manifest
from vl2.model.checkpoint import load_model
from vl2.safetensors_file import read_header

SCHEMES = ("fp32", "fp16")
DTYPES = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}


@pytest.fixture(scope="module", params=SCHEMES)
def exported(request: pytest.FixtureRequest, mini_folder: Path, bundle_of) -> tuple[Path, Path, Manifest]:
    """Checkpoint, bundle, manifest."""
    bundle = bundle_of(mini_folder, request.param)
    return mini_folder, bundle, read_manifest(bundle)


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    nodes = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                nodes += all_nodes(attribute.g)
    return nodes


def stored_weights(bundle: Path, graph: str) -> dict[str, np.ndarray]:
    """The arrays that external initializers refer to, read by hand."""
    proto = onnx.load(bundle / f"{graph}.onnx", load_external_data=False)
    arrays = {}
    for tensor in proto.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            assert place["location"] == f"{graph}.data"
            array = np.memmap(bundle / place["location"], DTYPES[tensor.data_type], "r", int(place["offset"]),
                              tuple(tensor.dims))
            assert array.nbytes == int(place["length"])
            arrays[tensor.name] = array
    return arrays


def test_every_file_is_listed_with_its_size_and_hash(exported) -> None:
    _, bundle, manifest = exported
    assert {path.name for path in bundle.iterdir()} == {MANIFEST_NAME, *manifest.files}
    check_files(bundle, manifest)


def test_the_manifest_names_the_source_and_its_hashes(exported) -> None:
    checkpoint, _, manifest = exported
    assert manifest.source.name == checkpoint.name
    assert {path.name for path in checkpoint.glob("*.safetensors")} <= manifest.source.files.keys()
    assert manifest.source.files["config.json"] == sha256_of(checkpoint / "config.json")


def test_the_graphs_use_standard_operators_only(exported) -> None:
    _, bundle, manifest = exported
    for graph in manifest.graphs.values():
        proto = onnx.load(bundle / graph.file, load_external_data=False)
        assert {node.domain for node in all_nodes(proto.graph)} == {""}
        assert [opset.domain for opset in proto.opset_import] == [""]
        assert not proto.functions


def test_the_checker_and_shape_inference_accept_the_files_in_place(exported) -> None:
    _, bundle, manifest = exported
    for graph in manifest.graphs.values():
        onnx.checker.check_model(bundle / graph.file, full_check=True)


def test_ports_are_those_of_the_manifest_and_dynamic_sides_have_their_names(exported) -> None:
    checkpoint, bundle, manifest = exported
    assert manifest.graphs == declare_graphs(load_config(checkpoint))
    for graph in manifest.graphs.values():
        proto = onnx.load(bundle / graph.file, load_external_data=False).graph
        for ports, values in ((graph.inputs, proto.input), (graph.outputs, proto.output)):
            shapes = [value.type.tensor_type.shape.dim for value in values]
            sides = [[side.dim_param or side.dim_value for side in shape] for shape in shapes]
            assert [value.name for value in values] == [port.name for port in ports]
            assert sides == [list(port.shape) for port in ports]


def test_the_graph_files_hold_no_path_and_no_note_of_this_machine(exported) -> None:
    _, bundle, manifest = exported
    for graph in manifest.graphs.values():
        content = (bundle / graph.file).read_bytes()
        assert b"/work" not in content and b"site-packages" not in content and b".py" not in content


def test_stored_weights_are_the_checkpoints_bit_for_bit_or_rounded_once(exported) -> None:
    checkpoint, bundle, manifest = exported
    wanted = {name: parameter.detach().numpy() for name, parameter in load_model(checkpoint).named_parameters()}
    left = set(wanted) - {"language.embed_tokens.weight", "image_newline", "view_seperator"}
    for graph in manifest.graphs:
        for name, array in stored_weights(bundle, graph).items():
            parameter, _, expert = name.rpartition(".") if name.rpartition(".")[2].isdigit() else (name, "", "")
            parameter = parameter.partition(":")[0]
            left.discard(parameter)
            if parameter != name and not expert:
                continue  # a rearranged part: the next test
            original = wanted[parameter][int(expert)] if expert else wanted[parameter]
            assert np.array_equal(array, original.astype(array.dtype)), name
    assert not left, f"parameters that no graph holds: {left}"


def test_latent_attention_stores_its_up_projections_by_head(bundle_of, goldens: Path) -> None:
    checkpoint = goldens / "small-mini"
    language = load_config(checkpoint).language_config
    parts = {name: array for name, array in stored_weights(bundle_of(checkpoint), "decoder").items() if ":" in name}
    assert len(parts) == 2 * language.num_hidden_layers
    weight = load_model(checkpoint).language.layers[1].self_attn.kv_b_proj.weight.detach()
    by_head = weight.view(language.num_attention_heads, -1, language.kv_lora_rank)
    w_k, w_v = (array for name, array in parts.items() if ".layers.1." in name)
    assert torch.equal(torch.tensor(w_k), by_head[:, : language.qk_nope_head_dim])
    assert torch.equal(torch.tensor(w_v), by_head[:, language.qk_nope_head_dim :].transpose(1, 2))


def test_experts_of_a_stack_follow_each_other_and_big_tensors_begin_on_a_page(exported) -> None:
    _, bundle, _ = exported
    proto = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer if tensor.external_data
    }
    for name, place in places.items():
        stem, _, expert = name.rpartition(".")
        if expert.isdigit() and int(expert) > 0:
            before = places[f"{stem}.{int(expert) - 1}"]
            assert int(place["offset"]) == int(before["offset"]) + int(before["length"]), name
        else:
            assert int(place["offset"]) % 4096 == 0, name


def test_the_embeddings_file_is_plain_safetensors(exported) -> None:
    from safetensors.numpy import load_file

    checkpoint, bundle, manifest = exported
    tensors, model = load_file(bundle / manifest.embeddings.file), load_model(checkpoint)
    table = model.language.embed_tokens.weight.detach().numpy()
    assert np.array_equal(tensors["embed_tokens"], table.astype(tensors["embed_tokens"].dtype))
    assert np.array_equal(tensors["view_seperator"], model.view_seperator.detach().numpy())
    header = read_header(bundle / manifest.embeddings.file)
    assert {name: (entry.dtype, entry.shape) for name, entry in header.items()} == {
        name: (stored.dtype, stored.shape) for name, stored in manifest.embeddings.tensors.items()
    }


def test_vectors_and_the_router_stay_float32_in_every_scheme(bundle_of, goldens: Path) -> None:
    weights = stored_weights(bundle_of(goldens / "base-mini", "fp16"), "decoder")
    for name, array in weights.items():
        narrow = array.ndim > 1 and not name.endswith("mlp.gate.weight")
        assert array.dtype == (np.float16 if narrow else np.float32), name


def test_module_sizes_add_up_to_the_parameters_of_the_model(exported) -> None:
    checkpoint, _, manifest = exported
    total = sum(parameter.numel() for parameter in load_model(checkpoint).parameters())
    assert sum(facts.parameters for facts in manifest.modules.values()) == total


def test_parity_is_recorded_and_far_inside_its_bound(exported) -> None:
    verify = exported[2].verify
    assert verify["status"] == "passed" and verify["tokens_equal"]
    # float32 sums in another order: see tests/tolerances.py; the bound itself is 1e-3
    assert max(verify["logits_difference"], verify["chunked_difference"], verify["features_difference"]) < 5e-5


def test_the_plan_foretells_the_bundle(exported) -> None:
    checkpoint, bundle, manifest = exported
    plan = plan_export(checkpoint, ExportOptions(scheme=manifest.scheme))
    assert plan.modules == manifest.modules
    for name, planned in plan.graphs.items():
        file = manifest.embeddings.file if name == "embeddings" else f"{name}.data"
        size = (bundle / file).stat().st_size
        assert planned <= size <= planned + 4096 * 400  # alignment: at most a page a tensor
    assert f"{plan.bundle_bytes / 1e6:.1f} MB" in plan.describe()


@pytest.mark.parametrize("graph", ["vision", "decoder"])
def test_a_session_widens_no_stored_weight_at_its_start(
    bundle_of, goldens: Path, tmp_path: Path, graph: str
) -> None:
    bundle = bundle_of(goldens / "small-mini", "fp16")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(bundle / f"{graph}.onnx", options, ["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    narrow = [name for name, array in stored_weights(bundle, graph).items() if array.dtype == np.float16]
    casts = [node for node in all_nodes(optimized.graph) if node.op_type == "Cast" and "wide" in node.output[0]]
    assert len(casts) == len(narrow) > 0

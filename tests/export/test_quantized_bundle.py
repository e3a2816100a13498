"""Bundles of quantized checkpoints: their codes are the checkpoint's, their logits those of the dequantized model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.conftest import NANO
from vl2.config import load_config
from vl2.errors import VL2Error
from vl2.export import ExportOptions, export_checkpoint, plan_export
from vl2.inspection import describe, inspect_path
from vl2.manifest import Manifest, check_files, read_manifest
from vl2.model.checkpoint import iter_tensors, parameter_sources
from vl2.runtime import GenerationOptions, open_bundle
from vl2.safetensors_file import read_header

CASES = [(recipe, lowering) for recipe in ("int4", "int8") for lowering in ("portable", "ort")]
DTYPES = {"FLOAT": np.float32, "FLOAT16": np.float16, "UINT8": np.uint8, "INT8": np.int8, "INT4": np.uint8}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def exported(request: pytest.FixtureRequest, mini_folder: Path, quantized_of, bundle_of) -> tuple[Path, Path, Manifest]:
    """Quantized checkpoint, bundle, manifest."""
    recipe, lowering = request.param
    folder = quantized_of(mini_folder, recipe)
    bundle = bundle_of(folder, None, lowering)
    return folder, bundle, read_manifest(bundle)


def stored_arrays(bundle: Path, graph: str) -> Iterator[tuple[str, np.ndarray]]:
    """Each external initializer with its numbers; INT4 as signed numbers."""
    for tensor in initializers(onnx.load(bundle / f"{graph}.onnx", load_external_data=False).graph):
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            continue
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        count = int(place["length"]) // np.dtype(DTYPES[kind]).itemsize
        array = np.fromfile(bundle / place["location"], DTYPES[kind], count, offset=int(place["offset"]))
        if kind == "INT4":
            array = (nibbles(array).astype(np.int8) ^ 8) - 8
        yield tensor.name, array.reshape(tuple(tensor.dims))


def initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Those of the graph and of its branches."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from initializers(attribute.g)


def nibbles(array: np.ndarray) -> np.ndarray:
    return np.stack((array & 15, array >> 4), axis=-1).reshape(*array.shape[:-1], -1)


def dequantized(bundle: Path, graph: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight [N, K] (or by head) as the operators' definitions read it, float32."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in stored_arrays(bundle, graph):
        weight, _, part = name.rpartition("/") if "/" in name else (name, "", "values")
        parts.setdefault(weight, {})[part] = array
    for name, found in parts.items():
        scales = found.pop("scales", None)
        if scales is None:
            yield name, found["values"]
            continue
        if "codes" in found:
            codes = found["codes"].astype(np.float32)
        elif "nibbles" in found:
            codes = nibbles(found["nibbles"]).reshape(len(scales), -1).astype(np.float32) - 8
        else:
            high, low = (nibbles(found[part]).reshape(len(scales), -1).astype(np.float32) for part in ("high", "low"))
            codes = 16 * (high - 8) + low
        axis = next(i for i, side in enumerate(scales.shape) if side != codes.shape[i] or i == codes.ndim - 1)
        yield name, codes * np.repeat(scales.astype(np.float32), codes.shape[axis] // scales.shape[axis], axis)


def test_stored_codes_dequantize_to_the_checkpoints_weights_bit_for_bit(exported) -> None:
    folder, bundle, manifest = exported
    config, weights = load_config(folder), {name: tensor.float().numpy() for name, tensor in iter_tensors(folder)}
    sources, seen = parameter_sources(config), set()
    for graph in manifest.graphs:
        for name, got in dequantized(bundle, graph):
            stem, _, number = name.rpartition(".")
            stacked = number.isdigit() and len(sources.get(stem, ())) > 1
            parameter = (stem if stacked else name).partition(":")[0]
            wanted = weights[sources[parameter][int(number) if stacked else 0]]
            seen.update(sources[parameter])
            if ":" in name:
                heads = config.language_config.num_attention_heads
                nope = config.language_config.qk_nope_head_dim
                by_head = wanted.reshape(heads, -1, wanted.shape[-1])
                wanted = by_head[:, :nope] if got.shape == by_head[:, :nope].shape and "permute" not in name else \
                    by_head[:, nope:].swapaxes(1, 2)
            if got.ndim == 2:
                got = got[:, : wanted.shape[1]]  # a last block may be partial
            # what the recipe kept is rounded to float16 once, as in that scheme
            assert np.array_equal(got, wanted.astype(got.dtype)), name
    assert not weights.keys() - seen - {"language.model.embed_tokens.weight", "image_newline", "view_seperator"}


def test_the_token_table_keeps_its_codes(exported) -> None:
    folder, bundle, manifest = exported
    header = read_header(bundle / manifest.embeddings.file)
    assert header["embed_tokens"].dtype == "I8" and header["embed_tokens.scales"].dtype == "F16"
    model = open_bundle(bundle)
    ids = np.arange(manifest.language.vocab_size)
    wanted = dict(iter_tensors(folder))["language.model.embed_tokens.weight"].numpy()
    assert np.array_equal(model.engine.embeddings.lookup(ids), wanted)


def test_parity_with_the_dequantized_model_is_recorded_and_far_inside_its_bound(exported) -> None:
    verify = exported[2].verify
    assert verify["status"] == "passed" and verify["tokens_equal"]
    assert max(verify["logits_difference"], verify["chunked_difference"], verify["features_difference"]) < 5e-5


def test_the_manifest_tells_recipe_method_and_forms(exported) -> None:
    folder, bundle, manifest = exported
    facts = json.loads((folder / "quantization.json").read_text())
    assert manifest.scheme == facts["recipe"]["name"] and manifest.quantization["method"] == "rtn"
    assert manifest.quantization["recipe"] == facts["recipe"] and "matrices" not in manifest.quantization
    assert all(form.startswith(manifest.scheme) for form in manifest.quantization["forms"]["experts"])
    assert manifest.source.files.keys() >= {"quantization.json", "config.json"}
    assert "quantization_config" not in json.loads((bundle / "config.json").read_text())
    check_files(bundle, manifest)


def test_inspecting_the_bundle_tells_scheme_and_bits_by_module(exported) -> None:
    _, bundle, manifest = exported
    text = describe(inspect_path(bundle))
    assert f"quantized: recipe {manifest.scheme}, method rtn" in text and f"lowering {manifest.lowering}" in text
    experts = next(line for line in text.splitlines() if line.startswith("  experts "))
    assert f"{manifest.scheme}" in experts and "×" in experts


def test_the_plan_foretells_the_sizes(exported) -> None:
    folder, bundle, manifest = exported
    plan = plan_export(folder, ExportOptions(lowering=manifest.lowering))
    assert plan.modules == manifest.modules and (plan.scheme, plan.lowering) == (manifest.scheme, manifest.lowering)
    graphs = {name: bundle / graph.data_file for name, graph in manifest.graphs.items()}
    for name, path in (graphs | {"embeddings": bundle / manifest.embeddings.file}).items():
        assert plan.graphs[name] <= path.stat().st_size <= plan.graphs[name] + 4096 * 1200  # a page a tensor at most


def test_portable_has_standard_operators_only_and_ort_names_its_domain(exported) -> None:
    _, bundle, manifest = exported
    for graph in manifest.graphs.values():
        model = onnx.load(bundle / graph.file, load_external_data=False)
        domains = {opset.domain: opset.version for opset in model.opset_import}
        expected = {"", "com.microsoft"} if (manifest.lowering, graph.file) == ("ort", "decoder.onnx") else {""}
        assert domains.keys() == expected and domains[""] == 21


def test_the_runtime_answers_the_same_from_both_lowerings(mini_folder: Path, quantized_of, bundle_of) -> None:
    options = GenerationOptions(max_new_tokens=12, ignore_eos=True, prefill_chunk=100)
    image = mini_folder.parent / "images" / "sq_384x384.png"
    for recipe in ("int4", "int8"):
        folder = quantized_of(mini_folder, recipe)
        answers = {open_bundle(bundle_of(folder, None, lowering)).ask("What is shown?", [image], options).token_ids
                   for lowering in ("portable", "ort")}  # fmt: skip
        assert len(answers) == 1


@pytest.mark.parametrize("recipe, lowering", CASES)
def test_nano_answers_from_a_quantized_bundle(quantized_of, bundle_of, recipe: str, lowering: str) -> None:
    bundle = bundle_of(quantized_of(NANO, recipe), None, lowering)
    assert read_manifest(bundle).verify["status"] == "passed"
    image = NANO.parent / "demo.png"
    answer = open_bundle(bundle).ask("What is shown?", [image], GenerationOptions(max_new_tokens=8))
    assert answer.token_ids


def test_packed_matrices_belong_to_the_branch_that_reads_them(exported) -> None:
    """onnxruntime packs no initializer from an outer graph: decoding was 24 times as slow."""
    _, bundle, manifest = exported
    outer = {tensor.name for tensor in onnx.load(bundle / "decoder.onnx", load_external_data=False).graph.initializer}
    packed = {name for name, _ in stored_arrays(bundle, "decoder") if ".experts." in name and "/" in name}
    assert packed and (packed <= outer if manifest.lowering == "portable" else not packed & outer)


def test_an_interrupted_export_of_codes_goes_on_and_gives_the_same_files(
    quantized_of, goldens: Path, tmp_path: Path, bundle_of
) -> None:
    class Killed(BaseException):
        pass

    def progress(stage: str, done_bytes: int, total_bytes: int) -> None:
        if stage == "decoder weights":
            raise Killed

    folder, options = quantized_of(goldens / "tiny-mini", "int4"), ExportOptions(verify=False, lowering="ort")
    with pytest.raises(Killed):
        export_checkpoint(folder, tmp_path / "bundle", options, progress)
    assert (tmp_path / ".bundle.partial" / "vision.data").exists() and not (tmp_path / "bundle").exists()
    assert export_checkpoint(folder, tmp_path / "bundle", options).files == \
        read_manifest(bundle_of(folder, None, "ort")).files


def test_a_checkpoint_without_a_description_is_named_by_its_smallest_codes(
    quantized_of, goldens: Path, tmp_path: Path
) -> None:
    """As other programs write them."""
    for path in quantized_of(goldens / "tiny-mini", "int4").iterdir():
        if path.name != "quantization.json":
            (tmp_path / path.name).symlink_to(path)
    assert plan_export(tmp_path, ExportOptions()).scheme == "int4"


def test_a_scheme_for_a_quantized_checkpoint_is_refused(quantized_of, goldens: Path, tmp_path: Path) -> None:
    folder = quantized_of(goldens / "tiny-mini", "int4")
    with pytest.raises(VL2Error, match="is quantized, and its codes are exported as they are"):
        export_checkpoint(folder, tmp_path / "bundle", ExportOptions(scheme="fp16"))


def test_lowerings_are_refused_where_they_do_not_apply(quantized_of, goldens: Path) -> None:
    with pytest.raises(VL2Error, match="there is no lowering `cuda`"):
        plan_export(quantized_of(goldens / "tiny-mini", "int4"), ExportOptions(lowering="cuda"))
    with pytest.raises(VL2Error, match="`ort` is for quantized checkpoints"):
        plan_export(goldens / "tiny-mini", ExportOptions(lowering="ort"))

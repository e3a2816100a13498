"""Bundles that run on the operator library: parity with PyTorch, the portable bundle's answers, weights bit for bit."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from vl2 import operators
from vl2.config import load_config
from vl2.errors import VL2Error
from vl2.export import ExportOptions, export_checkpoint, plan_export
from vl2.manifest import Manifest, read_manifest
from vl2.model.checkpoint import iter_tensors, parameter_sources
from vl2.plugins.native.layout import ROWS, Layout, unpack
from vl2.prompt import Message
from vl2.runtime import BundleOptions, GenerationOptions, Model, open_bundle
from vl2.runtime.engine import LARGEST_BATCH, Step, run_steps

pytestmark = pytest.mark.skipif(operators.library_path()[0] is None, reason="the operator library was not built")

CASES = [("small-mini", "int4"), ("base-mini", "int8"), ("tiny-mini", "fp16")]
PREFIXES = {"Linear": {1: ""}, "Experts": {2: "", 3: "down_", 5: "shared_", 6: "shared_down_"}}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exported(request, goldens: Path, quantized_of, bundle_of) -> tuple[Path, Path, Manifest]:
    """Checkpoint, bundle, manifest."""
    name, scheme = request.param
    folder = goldens / name if scheme == "fp16" else quantized_of(goldens / name, scheme)
    bundle = bundle_of(folder, "fp16" if scheme == "fp16" else None, "cpu")
    return folder, bundle, read_manifest(bundle)


def test_parity_with_the_model_is_recorded_and_far_inside_its_bound(exported) -> None:
    verify = exported[2].verify
    assert verify["status"] == "passed" and verify["tokens_equal"]
    assert max(verify["logits_difference"], verify["chunked_difference"], verify["features_difference"]) < 5e-5


def test_answers_are_those_of_the_portable_bundle(exported, goldens: Path, bundle_of) -> None:
    """Over three turns, so that chunks, decode steps and a cache that is cut and grown take part."""
    folder, bundle, manifest = exported
    scheme = "fp16" if manifest.scheme == "fp16" else None
    options = GenerationOptions(max_new_tokens=40, ignore_eos=True, prefill_chunk=100)
    image = goldens / "images" / "sq_384x384.png"
    answers = []
    for path in (bundle, bundle_of(folder, scheme, "portable")):
        chat = open_bundle(path).chat()
        first, second = chat.ask("What is shown?", [image], options), chat.ask("And where?", options=options)
        answers.append([first.token_ids, second.token_ids, open_bundle(path).ask("Why?", options=options).token_ids])
        assert second.reused_tokens >= first.prompt_tokens
    assert answers[0] == answers[1]


def test_the_plan_foretells_the_sizes(exported) -> None:
    folder, bundle, manifest = exported
    plan = plan_export(folder, ExportOptions(lowering="cpu"))
    assert plan.modules == manifest.modules and plan.lowering == manifest.lowering == "cpu"


def test_every_linear_and_all_experts_and_attentions_are_nodes_of_the_library(exported) -> None:
    folder, bundle, manifest = exported
    config = load_config(folder).language_config
    nodes = [node for node in onnx.load(bundle / "decoder.onnx", load_external_data=False).graph.node]
    counts = {name: sum(node.op_type == name for node in nodes) for name in ("Experts", "Attention", "LatentAttention")}
    layers, moe = config.num_hidden_layers, sum(config.is_moe(l) for l in range(config.num_hidden_layers))
    assert counts == {"Experts": moe, "Attention": layers * (not config.use_mla), "LatentAttention":
                      layers * config.use_mla}  # fmt: skip
    # the router, in float32, is all that is left to standard operators beside latent attention's products by head
    assert not any(node.op_type in ("Gemm", "MatMulNBits") for node in nodes)
    assert sum(node.op_type == "MatMul" for node in nodes) == moe + 2 * layers * config.use_mla


def test_the_towers_attention_is_one_node_a_block(exported) -> None:
    folder, bundle, manifest = exported
    vision = load_config(folder).vision_config
    nodes = onnx.load(bundle / manifest.graphs["vision"].file, load_external_data=False).graph.node
    found = [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in nodes
             if node.op_type == "VisionAttention"]
    scale = pytest.approx((vision.width // vision.heads) ** -0.5)
    assert found == [{"heads": vision.heads, "scale": scale}] * vision.layers
    assert not any(node.op_type in ("Softmax", "MatMul") for node in nodes)


def test_stored_weights_are_the_checkpoints_bit_for_bit(exported) -> None:
    folder, bundle, manifest = exported
    config, weights = load_config(folder), {name: tensor.float().numpy() for name, tensor in iter_tensors(folder)}
    sources, seen = parameter_sources(config), set()
    for parameter, layout, stored in native_weights(bundle, manifest):
        joined = ".mlp.experts." in parameter or ".mlp.shared_experts." in parameter
        partner = parameter.replace("gate_proj", "up_proj") if joined and "gate_proj" in parameter else None
        for expert, name in enumerate(sources[parameter]):
            start = expert * layout.size_bytes
            got = unpack(layout, stored[start : start + layout.size_bytes])
            names = [name] if partner is None else [name, sources[partner][expert]]
            for turn, source in enumerate(names):
                wanted = weights[source]
                rows = got if partner is None else got.reshape(-1, len(names), ROWS, got.shape[1])[:, turn]
                rows = rows.reshape(-1, got.shape[1])[: len(wanted)]
                expected = wanted if layout.quantized else wanted.astype(np.float16).astype(np.float32)
                assert np.array_equal(rows, expected), source
                seen.add(source)
    assert len(seen) == sum(tensor.ndim == 2 for name, tensor in weights.items() if is_multiplied(name))


def is_multiplied(name: str) -> bool:
    """Whether a tensor of the checkpoint is a matrix that the library multiplies with."""
    others = ("embed_tokens.weight", "mlp.gate.weight", "kv_b_proj.weight")
    return name.endswith("weight") and not name.endswith(others) and ".attn_pool." not in name


def native_weights(bundle: Path, manifest: Manifest):
    """Parameter, layout of one matrix and bytes of every weight that a node of the library reads."""
    for graph in manifest.graphs.values():
        model = onnx.load(bundle / graph.file, load_external_data=False).graph
        places = {tensor.name: {e.key: e.value for e in tensor.external_data} for tensor in model.initializer}
        for node in model.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            for index, prefix in PREFIXES.get(node.op_type, {}).items() if node.domain == "vl2" else ():
                if index >= len(node.input) or not node.input[index]:
                    continue
                place, name = places[node.input[index]], node.input[index]
                stored = np.fromfile(bundle / place["location"], np.uint8, int(place["length"]),
                                     offset=int(place["offset"]))  # fmt: skip
                yield name, layout_of(attributes, node.op_type, prefix), stored


def layout_of(attributes: dict, op_type: str, prefix: str) -> Layout:
    """As the node's attributes say."""
    if op_type == "Linear":
        rows, columns = attributes["N"], attributes["K"]
    else:
        hidden = attributes["hidden_size"]
        inner = attributes["shared_size"] if prefix.startswith("shared") else attributes["inner_size"]
        rows, columns = (hidden, inner) if prefix.endswith("down_") else (2 * -(-inner // ROWS) * ROWS, hidden)
    form = [attributes[prefix + key] for key in ("scheme", "group_size", "scale_dtype")]
    return Layout(rows, columns, form[0].decode(), form[1], form[2].decode())


@settings(max_examples=10, phases=(Phase.explicit, Phase.generate))
@given(lengths=st.lists(st.integers(1, 90), min_size=2, max_size=LARGEST_BATCH), threads=st.sampled_from((1, 2)),
       seed=st.integers(0, 99))
def test_a_step_of_a_batch_has_the_bits_of_single_steps(exported, lengths: list[int], threads: int, seed: int) -> None:
    """Through the whole decoder: any slots, any lengths, logits and caches."""
    model, rng = opened(exported[1], threads), np.random.default_rng(seed)
    graph, vocabulary = model.manifest.graphs["decoder"], model.manifest.language.vocab_size
    rows, slots = np.arange(len(lengths)), rng.permutation(LARGEST_BATCH + 2)[:len(lengths)]
    ports = {port.name: port for port in graph.inputs}
    caches = {pair.past: 0.1 * rng.standard_normal((LARGEST_BATCH + 2, 92, *ports[pair.past].shape[2:]), np.float32)
              for pair in graph.cache}
    embeds = model.engine.embeddings.lookup(rng.integers(3, vocabulary, len(lengths)))[:, None]

    def step(rows: np.ndarray) -> tuple[np.ndarray, dict]:
        written, past = {name: cache.copy() for name, cache in caches.items()}, np.array(lengths)[rows]
        feeds = {"inputs_embeds": embeds[rows], "position_ids": past[:, None], "past_length": past,
                 "cache_row": slots[rows], **written}
        logits = np.empty((len(rows), vocabulary), np.float32)
        model.engine.backend.run("decoder", feeds, {"logits": logits})
        return logits, written

    together, written = step(rows)
    for row in rows:
        alone, of_one = step(rows[row:row + 1])
        assert np.array_equal(alone[0], together[row])
        assert all(np.array_equal(of_one[name][slots[row]], written[name][slots[row]]) for name in caches)


@functools.cache
def opened(bundle: Path, threads: int) -> Model:
    return open_bundle(bundle, BundleOptions(threads=threads))


def test_answers_taken_together_are_those_of_single_runs(exported, goldens: Path) -> None:
    """An image, sampling and a shared prefix among them; each has the tokens and logprobs that it has alone."""
    image = Image.open(goldens / "images" / "sq_384x384.png").convert("RGB")
    asked = [([Message("user", "<image>\nWhat is shown?", [image])], {}), ([Message("user", "Why?")], {}),
             ([Message("user", "<image>\nWhat is written?", [image])], {"temperature": 1.0, "seed": 3})]
    options = [GenerationOptions(max_new_tokens=12, ignore_eos=True, top_logprobs=2, **more) for _, more in asked]
    single, model = open_bundle(exported[1]), open_bundle(exported[1])
    # One model, so that both take the same prefixes over: those change last bits, as prefill in other chunks does.
    expected = [single.complete(messages, each).read() for (messages, _), each in zip(asked, options, strict=True)]
    streams = [model.complete(messages, each) for (messages, _), each in zip(asked, options, strict=True)]
    waiting: dict = dict.fromkeys(streams)
    while waiting:
        steps = {stream: step for stream in waiting if (step := next_step(stream, waiting[stream])) is not None}
        waiting = dict(zip(steps, run_steps(list(steps.values())), strict=True))
    for stream, answer in zip(streams, expected, strict=True):
        assert (stream.answer.token_ids, stream.answer.logprobs) == (answer.token_ids, answer.logprobs)


def next_step(stream, given) -> Step | None:
    """The step that an answer waits for next, None at its end."""
    try:
        while isinstance(found := stream.resume(given), str):
            given = None
        return found
    except StopIteration:
        return None


@pytest.mark.parametrize("name, kv_cache", [("small-mini", "int8"), ("tiny-mini", "fp16")])
def test_narrow_caches_answer_as_the_model_with_caches_rounded_alike(
    goldens: Path, tmp_path: Path, name: str, kv_cache: str
) -> None:
    """The parity run's reference rounds keys, values and latents by itself (`plugins/attention/cache.py`)."""
    options = ExportOptions(lowering="cpu", kv_cache=kv_cache)
    manifest = export_checkpoint(goldens / name, tmp_path / "bundle", options)
    verify, ports = manifest.verify, {port.name: port.dtype for port in manifest.graphs["decoder"].inputs}
    caches = [ports[pair.past] for pair in manifest.graphs["decoder"].cache]
    wanted = {"fp16": {"float16"}, "int8": {"int8", "float32"}}  # codes with their scales
    assert set(caches) == wanted[kv_cache] and verify["tokens_equal"] and verify["status"] == "passed"
    assert max(verify["logits_difference"], verify["chunked_difference"]) <= verify["bound"]


@pytest.mark.parametrize("kv_cache", ["fp16", "int8"])
def test_a_chat_over_a_narrow_cache_goes_on_as_one_long_prompt(
    goldens: Path, tmp_path: Path, kv_cache: str
) -> None:
    """Chunks, decode steps, a cache cut and grown: what was written in pieces is what one prefill writes."""
    bundle = tmp_path / "bundle"
    export_checkpoint(goldens / "base-mini", bundle, ExportOptions(verify=False, lowering="cpu", kv_cache=kv_cache))
    options = GenerationOptions(max_new_tokens=30, ignore_eos=True, prefill_chunk=40)
    chat, image = open_bundle(bundle).chat(), goldens / "images" / "sq_384x384.png"
    chat.ask("What is shown?", [image], options)
    second = chat.ask("And where?", options=options)
    again = open_bundle(bundle).chat()
    again.history = chat.history[:2]
    fresh = again.ask("And where?", options=replace(options, prefill_chunk=4096))
    assert second.reused_tokens > 0 and fresh.reused_tokens == 0 and second.token_ids == fresh.token_ids


def test_the_fast_mode_is_named_and_errs_by_its_rounding_only(goldens: Path, quantized_of, tmp_path: Path) -> None:
    """Its kernels are tested against their references in tests/plugins; here the graphs that take them."""
    folder, bundle = quantized_of(goldens / "small-mini", "int4"), tmp_path / "bundle"
    manifest = export_checkpoint(folder, bundle, ExportOptions(lowering="cpu", mode="fast"))
    assert (manifest.mode, manifest.operators) == ("fast", "cpu fast")
    graphs = [onnx.load(bundle / f"{name}.onnx", load_external_data=False).graph for name in ("vision", "decoder")]
    attributes = [a for graph in graphs for node in graph.node if node.domain == "vl2" for a in node.attribute]
    modes = {onnx.helper.get_attribute_value(a) for a in attributes if a.name == "mode"}
    assert modes == {b"fast"}
    # the exact mode differs by 5e-6, see above: this is the rounding, and it is far below a wrong answer
    assert 1e-3 < manifest.verify["logits_difference"] <= manifest.verify["bound"] < 0.5


def test_a_mode_that_a_lowering_does_not_have_is_refused(goldens: Path, quantized_of) -> None:
    folder = quantized_of(goldens / "small-mini", "int4")
    for lowering, mode, told in (("ort", "fast", "which has none"), ("cpu", "quick", "no mode `quick`")):
        with pytest.raises(VL2Error, match=told):
            plan_export(folder, ExportOptions(lowering=lowering, mode=mode))


@pytest.mark.parametrize("kv_cache, lowering, told", [("fp16", "portable", "whose caches are fp32"),
                                                      ("fp8", "cpu", "there is no KV cache `fp8`")])
def test_caches_that_a_lowering_does_not_have_are_refused(
    goldens: Path, kv_cache: str, lowering: str | None, told: str
) -> None:
    with pytest.raises(VL2Error, match=told):
        plan_export(goldens / "tiny-mini", ExportOptions(lowering=lowering, kv_cache=kv_cache))


def test_float32_is_refused(goldens: Path) -> None:
    with pytest.raises(VL2Error, match="the scheme `fp32` was asked for"):
        plan_export(goldens / "tiny-mini", ExportOptions("fp32", lowering="cpu"))


def test_a_bundle_is_refused_where_the_library_is_absent(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "NAME", "absent.so")
    with pytest.raises(VL2Error, match="has the lowering `cpu`, and the operator library .* was not built") as caught:
        open_bundle(exported[1]).ask("What?")
    assert "--lowering ort" in caught.value.hint


def test_the_library_is_named_where_onnxruntime_refuses_it(
    exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    monkeypatch.setattr(operators, "library_path", lambda: (tmp_path / "broken.so", None))
    with pytest.raises(VL2Error, match="onnxruntime does not load .*broken.so"):
        open_bundle(exported[1]).ask("What?")


def test_an_interrupted_export_gives_the_same_files(quantized_of, goldens: Path, tmp_path: Path, bundle_of) -> None:
    class Killed(BaseException):
        pass

    def progress(stage: str, done_bytes: int, total_bytes: int) -> None:
        if stage == "decoder weights":
            raise Killed

    folder, options = quantized_of(goldens / "small-mini", "int4"), ExportOptions(verify=False, lowering="cpu")
    with pytest.raises(Killed):
        export_checkpoint(folder, tmp_path / "bundle", options, progress)
    assert export_checkpoint(folder, tmp_path / "bundle", options).files == \
        read_manifest(bundle_of(folder, None, "cpu")).files

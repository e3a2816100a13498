"""A bundle on engines answers as on the CPU, token for token. CUDA and TensorRT are fakes that emulate the graphs on
the memory that the runtime binds; what is the runtime's own, from the upload of weights to graphs, is real.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import NANO
from tests.runtime.engines.conftest import SIZES, Machine, with_engines
from vl2.errors import VL2Error
from vl2.export.session import GraphSession
from vl2.prompt import Message
from vl2.runtime import BundleOptions, GenerationOptions, Model, open_bundle
from vl2.runtime.engine import Context

RTX, CPU = BundleOptions(backend="trt-rtx"), BundleOptions(backend="ort-cpu")
SHORT = GenerationOptions(6, ignore_eos=True)
IMAGE = Image.effect_noise((60, 40), 90).convert("RGB")


@pytest.fixture
def tiny_model(tiny: Path, machine: Machine) -> Model:
    return open_bundle(with_engines(tiny), RTX)


@pytest.fixture(scope="session")
def tiny_on_cpu(goldens: Path, bundle_of: Callable[..., Path]) -> Model:
    return open_bundle(bundle_of(goldens / "tiny-mini"), CPU)


def test_nano_answers_as_on_the_cpu(nano_bundle: Path, trt_bundle_of, copied, machine: Machine) -> None:
    """Tiles by twos, prefill by chunks of 48, decode steps replayed; the question on the receipt has a right answer."""
    bundle = with_engines(copied(trt_bundle_of(NANO)))
    question, images = "What is the total?", [NANO.parent / "demo.png"]
    fast, plain = open_bundle(bundle).ask(question, images), open_bundle(nano_bundle, CPU).ask(question, images)
    assert fast.token_ids == plain.token_ids and fast.text == plain.text and plain.prompt_tokens > 3 * 48
    assert machine.driver.calls["cuGraphLaunch"] == len(fast.token_ids) - 1
    assert machine.driver.calls["cuStreamBeginCapture"] == 1


def test_latent_attention_and_int4_answer_as_on_the_cpu(goldens: Path, bundle_of, quantized_of, trt_bundle_of, copied,
                                                       machine: Machine) -> None:
    folder = goldens / "small-mini"
    fast = open_bundle(with_engines(copied(trt_bundle_of(folder, "int4"))))
    plain = open_bundle(bundle_of(quantized_of(folder, "int4"), None), CPU)
    answers = [model.ask("What is shown?", [IMAGE], SHORT) for model in (fast, plain)]
    assert answers[0].token_ids == answers[1].token_ids


def test_the_second_turn_of_a_chat_keeps_the_cache_on_the_device(tiny_model: Model, tiny_on_cpu: Model) -> None:
    turns = []
    for model in (tiny_model, tiny_on_cpu):
        chat = model.chat()
        turns.append([chat.ask("What is shown?", [IMAGE], SHORT), chat.ask("And why is that so?", options=SHORT)])
    (first, second), (plain_first, plain_second) = turns
    assert first.token_ids == plain_first.token_ids and second.token_ids == plain_second.token_ids
    assert second.reused_tokens == plain_second.reused_tokens > first.prompt_tokens


def test_a_prefix_that_two_conversations_share_is_copied_on_the_device(tiny_model: Model, tiny_on_cpu: Model) -> None:
    texts = ("Where is it, and what stands beside it on the left of the page?", "Why?")
    asked = [[Message("user", f"<image>\n{text}", [IMAGE])] for text in texts]
    found = {}
    for name, model in (("fast", tiny_model), ("plain", tiny_on_cpu)):
        answers = [model.complete(messages, SHORT).read() for messages in asked]
        found[name] = [(answer.token_ids, answer.reused_tokens) for answer in answers]
    assert found["fast"] == found["plain"] and found["fast"][1][1] > 16
    pool = tiny_model._contexts
    assert len(pool._idle) == 2
    assert pool.used_bytes == sum(context._cache.size_bytes for context in pool._idle)


# "cut" keeps so many positions, the others add so many.
STEPS = (("prefill", 30), ("decode", 3), ("prefill", 60), ("cut", 40), ("decode", 3), ("prefill", 50), ("decode", 3))


def tokens_of(steps: tuple[tuple[str, int], ...]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(3, 600, count) for _, count in steps]


def walked(model: Model, steps: tuple[tuple[str, int], ...]) -> list[np.ndarray]:
    """Logits of a context that is extended by tokens, in one step or one by one, and cut back."""
    context, found = Context(model.engine), []
    for (kind, count), ids in zip(steps, tokens_of(steps), strict=True):
        if kind == "cut":
            context.keep_common(np.array([*context._contents[:count], -7, -7]))
        elif kind == "decode":
            found += [context.decode_step(int(token)) for token in ids]
        else:
            found.append(context.prefill(ids, model.engine.embeddings.lookup(ids), 512))
    return found


def walked_on_the_host(bundle: Path, model: Model, steps: tuple[tuple[str, int], ...]) -> list[np.ndarray]:
    """The same by the export's session, whose cache is NumPy's and has room for all from the beginning."""
    session, length, found = GraphSession(bundle, model.manifest, "decoder"), 0, []
    cache = session._empty_cache(256)
    for (kind, count), ids in zip(steps, tokens_of(steps), strict=True):
        if kind == "cut":
            length = count
            continue
        step = 1 if kind == "decode" else SIZES.prefill_chunk
        for start in range(0, count, step):
            embeds = model.engine.embeddings.lookup(ids[start:start + step])
            logits, cache = session.step(embeds, length, cache)
            length += len(embeds)
            if kind == "decode" or start + step >= count:
                found.append(logits[0])
    return found


def test_growing_and_cutting_the_cache_changes_no_logits(tiny: Path, tiny_model: Model, machine: Machine) -> None:
    """From 64 positions to 153, and back to 40 of them; equal to the last bit."""
    expected = walked_on_the_host(tiny, tiny_model, STEPS)
    np.testing.assert_array_equal(walked(tiny_model, STEPS), expected)
    # for each capacity the first decode step is TensorRT's own, the second is captured, and all from then on replayed
    assert machine.driver.calls["cuStreamBeginCapture"] == 2 and machine.driver.calls["cuGraphLaunch"] == 7


@pytest.mark.parametrize("kept", [1, 8])
def test_conversations_taken_in_turns_do_not_disturb_each_other(tiny_model: Model, machine: Machine, monkeypatch,
                                                               kept: int) -> None:
    """Each has graphs of its own, and where too few are kept they are made again."""
    monkeypatch.setattr("vl2.runtime.engines.session._KEPT_STEPS", kept)
    ids = [np.random.default_rng(seed).integers(3, 600, 12) for seed in (0, 1)]
    alone = [walked_over(tiny_model, [row])[0] for row in ids]
    # a new cache may lie where one of those before lay, and would find its graph
    tiny_model.engine.backend._sessions["decoder"]._steps.clear()
    machine.driver.calls.clear()
    np.testing.assert_array_equal(walked_over(tiny_model, ids), alone)
    assert machine.driver.calls.get("cuGraphLaunch", 0) == (0 if kept == 1 else 2 * 7)


def walked_over(model: Model, rows: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Logits of one context a row: prefill of 4 tokens each, then a decode step of each in turn."""
    contexts, found = [Context(model.engine) for _ in rows], [[] for _ in rows]
    for context, ids in zip(contexts, rows, strict=True):
        context.prefill(ids[:4], model.engine.embeddings.lookup(ids[:4]), 512)
    for place in range(4, 12):
        for context, ids, logits in zip(contexts, rows, found, strict=True):
            logits.append(context.decode_step(int(ids[place])))
    return found


def test_steps_without_graphs_and_with_them_are_equal_bit_for_bit(tiny: Path, machine: Machine) -> None:
    with_engines(tiny)
    steps = (("prefill", 20), ("decode", 4))
    graphs, plain = (walked(open_bundle(tiny, BundleOptions(cuda_graph=use)), steps) for use in (True, False))
    np.testing.assert_array_equal(graphs, plain)
    assert machine.driver.calls["cuGraphLaunch"] == 3


def test_caches_and_weights_are_given_back_with_the_model(tiny: Path, machine: Machine) -> None:
    model = open_bundle(with_engines(tiny), RTX)
    model.ask("What?", options=SHORT)
    decoder = model.manifest.files["decoder.safetensors"].size_bytes
    assert machine.driver.held_bytes > decoder
    held = machine.driver.held_bytes
    model.ask("What?", options=SHORT)
    assert machine.driver.held_bytes == held, "the cache of a finished question is still there"
    del model
    machine.trt.contexts.clear()
    assert machine.driver.held_bytes == 0


def test_the_cache_never_grows_beyond_the_engines_context(tiny_model: Model) -> None:
    context = Context(tiny_model.engine)
    ids = np.full(600, 5)
    context.prefill(ids, tiny_model.engine.embeddings.lookup(ids), 512)
    context._cache.reserve(680)
    assert context._cache.capacity == SIZES.context


def test_a_prompt_beyond_the_engines_context_is_told_so(tiny_model: Model) -> None:
    with pytest.raises(VL2Error, match="the engines hold 700"):
        tiny_model.ask("word " * 800)


def test_a_failing_run_is_told_in_tensorrts_words(tiny_model: Model, machine: Machine) -> None:
    tiny_model.engine.backend.load("decoder")
    machine.trt.fail, waited = True, machine.driver.calls["cuStreamSynchronize"]
    with pytest.raises(VL2Error, match=r"running decoder.rtx-4090.engine failed: .*illegal memory access") as caught:
        tiny_model.ask("What?", options=SHORT)
    assert caught.value.hint
    assert machine.driver.calls["cuStreamSynchronize"] > waited, "copies of inputs that are let go of are under way"


def test_a_step_that_cannot_be_captured_is_an_error_with_the_way_out(tiny: Path, machine: Machine) -> None:
    machine.driver.refuse_capture = True
    with_engines(tiny)
    with pytest.raises(VL2Error, match="cannot be captured as a CUDA graph: cuStreamEndCapture failed: 901") as caught:
        open_bundle(tiny, RTX).ask("What?", options=SHORT)
    assert "--no-cuda-graph" in caught.value.hint
    assert len(open_bundle(tiny, BundleOptions(cuda_graph=False)).ask("What?", options=SHORT).token_ids) == 6


def test_a_step_that_tensorrt_says_cannot_be_captured_is_not_tried(tiny_model: Model, machine: Machine) -> None:
    machine.trt.capturable = False
    with pytest.raises(VL2Error, match="cannot be captured as a CUDA graph: tensorrt_rtx says that") as caught:
        tiny_model.ask("What?", options=SHORT)
    assert "--no-cuda-graph" in caught.value.hint and "cuStreamBeginCapture" not in machine.driver.calls


def test_scratch_memory_that_finds_no_room_is_told_before_weights_are_copied(tiny: Path, machine: Machine,
                                                                            monkeypatch) -> None:
    with_engines(tiny)
    monkeypatch.setattr("tests.runtime.engines.fake_tensorrt.Engine.device_memory_size_v2", 3 << 30)
    with pytest.raises(VL2Error, match=r"decoder.rtx-4090.engine with 3.22 GB of scratch .* needs 3.22 GB") as caught:
        open_bundle(tiny, RTX).ask("What?", options=SHORT)
    assert "--prefill-chunk" in caught.value.hint and machine.driver.held_bytes == 0
    with pytest.raises(VL2Error, match="the GPU gives no 3.22 GB"):
        open_bundle(tiny, BundleOptions(check_memory=False)).ask("What?", options=SHORT)


def test_a_gpu_with_too_little_memory_is_told_before_anything_is_loaded(tiny: Path, machine: Machine) -> None:
    with_engines(tiny)
    machine.driver.size_bytes = 1000
    with pytest.raises(VL2Error, match="GB of the GPU's memory, 0.00 GB are free"):
        open_bundle(tiny, RTX)
    with pytest.raises(VL2Error, match="the GPU gives no"):
        open_bundle(tiny, BundleOptions(check_memory=False)).ask("What?")


def test_where_gpu_and_system_share_memory_the_page_cache_counts_as_free(tiny: Path, machine: Machine,
                                                                        monkeypatch) -> None:
    """On a Jetson the driver's figure leaves out what the kernel would give back; the system's does not."""
    with_engines(tiny)
    machine.driver.size_bytes, machine.driver.integrated = 1000, 1
    monkeypatch.setattr("vl2.memory.available_bytes", lambda: 4e9)
    assert open_bundle(tiny, RTX).engine.backend.cache_memory.available_bytes() == 4e9
    monkeypatch.setattr("vl2.memory.available_bytes", lambda: 1e6)
    with pytest.raises(VL2Error, match="0.00 GB are free"):
        open_bundle(tiny, RTX)


def test_an_engine_that_tensorrt_does_not_take_is_told_with_its_file(tiny: Path, machine: Machine) -> None:
    bundle = with_engines(tiny)
    path = bundle / "decoder.rtx-4090.engine"
    path.write_bytes(b"x" * path.stat().st_size)
    model = open_bundle(bundle, BundleOptions(check_hashes=False))
    with pytest.raises(VL2Error, match=r"loading .*decoder.rtx-4090.engine failed: .*magic tag"):
        model.ask("What?")

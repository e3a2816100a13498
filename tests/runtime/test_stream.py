"""Streams that are left: what was computed stays, nothing else does."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runtime.small_bundle import numpy_model_of
from tests.tolerances import LOGPROB
from vl2.errors import VL2Error
from vl2.prompt import Message
from vl2.runtime import GenerationOptions, Model
from vl2.runtime.answer import AnswerStream, Cancelled

LONG = GenerationOptions(max_new_tokens=200, ignore_eos=True, top_logprobs=1)
QUESTION = [Message("user", "<image>\nWhat is shown on this page, and where?", [Image.effect_noise((60, 40), 90)])]


def test_a_closed_stream_leaves_its_context_usable_and_is_never_an_answer(shared_bundle: Path) -> None:
    model = numpy_model_of(shared_bundle)
    stream = model.complete(QUESTION, LONG)
    next(stream)
    told, logprobs = stream.token_ids, stream.logprobs
    stream.close()
    stream.close()
    assert list(stream) == [] and len(told) == len(logprobs) >= 1
    with pytest.raises(VL2Error, match="not finished"):
        _ = stream.answer
    again = model.complete(QUESTION, LONG).read()
    assert again.reused_tokens == again.prompt_tokens - 1 and again.token_ids[:len(told)] == told
    assert again.token_ids == numpy_model_of(shared_bundle).complete(QUESTION, LONG).read().token_ids


def test_a_stream_closed_before_it_began_computes_nothing(numpy_model: Model) -> None:
    stream = numpy_model.complete(QUESTION, LONG)
    stream.close()
    assert list(stream) == [] and numpy_model.engine.backend.runs == []


def test_a_stream_that_is_dropped_gives_its_context_back(numpy_model: Model) -> None:
    stream = numpy_model.complete(QUESTION, LONG)
    next(stream)
    assert len(numpy_model._contexts._busy) == 1
    del stream
    assert not numpy_model._contexts._busy


def reading(stream: AnswerStream) -> tuple[threading.Thread, list[VL2Error]]:
    """A thread that reads the stream to its end, and the error that it met."""
    caught = []

    def take() -> None:
        try:
            stream.read()
        except VL2Error as error:
            caught.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    return thread, caught


@pytest.mark.parametrize("chunk", [512, 1], ids=["while decoding", "in the prefill"])
def test_closing_from_another_thread_ends_an_answer_in_the_making(numpy_model: Model, monkeypatch, chunk: int) -> None:
    options = GenerationOptions(max_new_tokens=400, ignore_eos=True, prefill_chunk=chunk)
    backend, run = numpy_model.engine.backend, numpy_model.engine.backend.run

    def slow(graph: str, feeds: dict, results: dict) -> None:
        time.sleep(0.01)
        run(graph, feeds, results)

    monkeypatch.setattr(backend, "run", slow)
    stream = numpy_model.complete(QUESTION, options)
    thread, caught = reading(stream)
    time.sleep(0.1)
    while not caught and thread.is_alive():
        stream.close()
        time.sleep(0.005)
    thread.join(10)
    assert isinstance(caught[0], Cancelled) or "not finished" in caught[0].message
    assert len(backend.runs) < 200 and not numpy_model._contexts._busy
    with pytest.raises(VL2Error, match="not finished"):
        _ = stream.answer


def test_a_context_is_not_given_back_while_a_step_writes_its_caches(numpy_model: Model, monkeypatch) -> None:
    """Closed from another thread in the middle of a decode step: the flag ends the answer behind it."""
    backend, run = numpy_model.engine.backend, numpy_model.engine.backend.run
    begun, goes_on = threading.Event(), threading.Event()

    def held(graph: str, feeds: dict, results: dict) -> None:
        if graph == "decoder" and feeds["inputs_embeds"].shape[1] == 1:
            begun.set()
            assert goes_on.wait(30)
        run(graph, feeds, results)

    monkeypatch.setattr(backend, "run", held)
    stream = numpy_model.complete(QUESTION, LONG)
    thread, caught = reading(stream)
    assert begun.wait(30)
    stream.close()
    assert len(numpy_model._contexts._busy) == 1
    goes_on.set()
    thread.join(30)
    assert isinstance(caught[0], Cancelled) and not numpy_model._contexts._busy


def test_an_answer_in_circles_is_ended_and_says_what_repeats(numpy_model: Model, monkeypatch) -> None:
    ids = numpy_model.engine.processor.tokenizer.encode("boats near ", add_special_tokens=False).ids
    position = iter(range(10_000))
    monkeypatch.setattr("vl2.runtime.sampling.Sampler.draw", lambda *_: ids[next(position) % len(ids)])
    question, options = [Message("user", "How many?")], GenerationOptions(max_new_tokens=500)
    answer = numpy_model.complete(question, options).read()
    assert answer.stop_reason == "loop" and len(answer.token_ids) == 256
    assert f"a block of {len(ids)} tokens is repeated" in answer.loop and "near" in answer.loop
    free = numpy_model.complete(question, GenerationOptions(max_new_tokens=500, repetition_guard=False)).read()
    assert (free.stop_reason, free.loop, len(free.token_ids)) == ("length", None, 500)
    measured = numpy_model.complete(question, GenerationOptions(max_new_tokens=500, ignore_eos=True)).read()
    assert (measured.stop_reason, measured.loop) == ("length", None)


def test_logprobs_are_of_the_models_own_distribution_and_one_a_token(numpy_model: Model, monkeypatch) -> None:
    seen, run = [], numpy_model.engine.backend.run

    def recording(graph: str, feeds: dict, results: dict) -> None:
        run(graph, feeds, results)
        if graph == "decoder":
            seen.append(results["logits"][0].astype(np.float64))

    monkeypatch.setattr(numpy_model.engine.backend, "run", recording)
    options = GenerationOptions(max_new_tokens=8, ignore_eos=True, top_logprobs=3, repetition_penalty=1.7,
                                presence_penalty=2.0, temperature=0.7, seed=3)
    answer = numpy_model.ask("What?", options=options)
    assert len(answer.logprobs) == len(answer.token_ids) == 8
    for logits, token, found in zip(seen, answer.token_ids, answer.logprobs, strict=True):
        expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert found.token_id == token and found.logprob == pytest.approx(expected[token], abs=LOGPROB)
        order = np.argsort(-expected, kind="stable")[:3]
        assert [entry[0] for entry in found.top] == order.tolist()
        assert [entry[2] for entry in found.top] == pytest.approx(expected[order].tolist(), abs=LOGPROB)
        assert found.text == numpy_model.engine.token_bytes[token]
    assert answer.to_dict()["logprobs"][0]["bytes"] == list(answer.logprobs[0].text)
    assert numpy_model.ask("What?").logprobs is None and numpy_model.ask("What?").to_dict()["logprobs"] is None

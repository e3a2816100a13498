"""Whole conversations from a pool of caches: answers as from nothing, and as little computed as can be."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.runtime.small_bundle import numpy_model_of
from vl2.errors import VL2Error
from vl2.prompt import Message
from vl2.runtime import GenerationOptions, Model
from vl2.runtime.context_pool import ContextPool

NOISE = [Image.effect_noise(size, 90) for size in ((60, 40), (33, 70))]
SHORT = GenerationOptions(max_new_tokens=6, ignore_eos=True)
SYSTEM = Message("system", "You read drawings, tables and forms. Be brief, say what stands there and nothing else.")
# Keys of 16 floats and one more: what one position of the small bundle takes.
POSITION_BYTES = 17 * 4


def about(image: int, question: str) -> list[Message]:
    return [SYSTEM, Message("user", f"<image>\n{question}", [NOISE[image]])]


def go_on(messages: list[Message], answer, question: str) -> list[Message]:
    return [*messages, Message("assistant", answer.text, token_ids=answer.token_ids), Message("user", question)]


def pooled(bundle: Path, positions: int) -> Model:
    return Model(numpy_model_of(bundle).engine, positions * POSITION_BYTES)


def decoder_tokens(model: Model) -> int:
    return sum(size for graph, size in model.engine.backend.runs if graph == "decoder")


CONVERSATIONS = st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.sampled_from(["Where is it?", "Why?"])),
                         min_size=1, max_size=7)


@settings(max_examples=25)
@given(CONVERSATIONS, st.sampled_from([0, 150, 300, 700, 3000]))
def test_answers_are_those_of_a_fresh_model_whatever_the_pool_holds(shared_bundle: Path, plan: list, size: int) -> None:
    """Four conversations, two about each image, gone on with or begun anew in any order."""
    model, held = pooled(shared_bundle, size), {}
    fresh = Model(model.engine, 0)
    for number, anew, question in plan:
        begun = held.get(number)
        messages = about(number % 2, question) if anew or begun is None else go_on(*begun, question)
        try:
            expected = fresh.complete(messages, SHORT).read()
        except VL2Error as error:
            assert "holds 700" in error.message
            continue
        answer = model.complete(messages, SHORT).read()
        assert answer.token_ids == expected.token_ids and expected.reused_tokens == 0
        held[number] = messages, answer
        assert model._contexts.used_bytes <= size * POSITION_BYTES


def test_the_next_turn_of_a_conversation_prefills_only_what_is_new(shared_bundle: Path) -> None:
    model = pooled(shared_bundle, 3000)
    messages = about(0, "Where is it?")
    first = model.complete(messages, SHORT).read()
    second = model.complete(go_on(messages, first, "Why?"), SHORT).read()
    assert second.reused_tokens == first.prompt_tokens + len(first.token_ids) - 1
    assert len(model._contexts._idle) == 1


def test_a_shared_prefix_is_copied_and_the_other_conversation_keeps_its_cache(shared_bundle: Path) -> None:
    model = pooled(shared_bundle, 3000)
    messages = about(0, "Where is it and what stands beside it on the left of the page?")
    first = model.complete(messages, SHORT).read()
    model.engine.backend.runs.clear()
    other = model.complete(about(0, "Why?"), SHORT).read()
    assert other.reused_tokens > 93 and "vision" not in dict(model.engine.backend.runs)
    again = model.complete(go_on(messages, first, "Go on."), SHORT).read()
    assert again.reused_tokens == first.prompt_tokens + len(first.token_ids) - 1
    assert len(model._contexts._idle) == 2


def test_where_memory_is_short_the_shared_prefix_is_continued_in_place(shared_bundle: Path) -> None:
    messages = about(0, "Where is it and what stands beside it on the left of the page?")
    model = pooled(shared_bundle, 260)
    model.complete(messages, SHORT).read()
    assert model.complete(about(0, "Why?"), SHORT).read().reused_tokens > 93
    assert len(model._contexts._idle) == 1


def test_a_machine_short_of_memory_keeps_less_than_the_bound_allows(shared_bundle: Path, monkeypatch) -> None:
    model = pooled(shared_bundle, 3000)
    model.complete(about(0, "Where is it and what stands beside it on the left of the page?"), SHORT).read()
    monkeypatch.setattr("vl2.memory.available_bytes", lambda: 100 * POSITION_BYTES)
    assert model.complete(about(0, "Why?"), SHORT).read().reused_tokens > 93
    assert len(model._contexts._idle) == 1
    model.complete([Message("user", "river " * 25)], SHORT).read()
    assert len(model._contexts._idle) == 1


def test_the_conversation_used_longest_ago_goes_first(shared_bundle: Path) -> None:
    model = pooled(shared_bundle, 300)
    first, second, third = ([Message("user", f"{word} " * 25)] for word in ("stone", "river", "cloud"))
    for messages in (first, second, first, third):
        answer = model.complete(messages, SHORT).read()
    assert answer.reused_tokens <= 16
    kept = [model._contexts._longest(contents(model, messages))[1] for messages in (first, second, third)]
    assert kept[0] > 16 and kept[2] > 16 and kept[1] <= 16


def contents(model: Model, messages: list[Message]) -> np.ndarray:
    return model.engine.processor.lay_out([*messages, Message("assistant", "")]).input_ids


def test_streams_of_two_conversations_may_be_taken_in_turns(shared_bundle: Path) -> None:
    model = pooled(shared_bundle, 3000)
    asked = [about(0, "Where is it?"), about(0, "Where is it?"), about(1, "Why?")]
    expected = [numpy_model_of(shared_bundle).complete(messages, SHORT).read().token_ids for messages in asked]
    streams = [model.complete(messages, SHORT) for messages in asked]
    while any([next(stream, None) is not None for stream in streams]):
        pass
    assert [stream.read().token_ids for stream in streams] == expected
    assert len(model._contexts._idle) == 3 and not model._contexts._busy


def test_a_pool_without_memory_keeps_nothing(shared_bundle: Path) -> None:
    model = pooled(shared_bundle, 0)
    for _ in range(2):
        assert model.complete(about(0, "Why?"), SHORT).read().reused_tokens == 0
    assert model._contexts.used_bytes == 0


def test_a_failing_backend_gives_the_context_back(shared_bundle: Path, monkeypatch) -> None:
    model = pooled(shared_bundle, 3000)
    with monkeypatch.context() as broken:
        broken.setattr(model.engine.backend, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.complete(about(0, "Why?"), SHORT).read()
    expected = numpy_model_of(shared_bundle).complete(about(0, "Why?"), SHORT).read()
    assert model.complete(about(0, "Why?"), SHORT).read().token_ids == expected.token_ids
    assert not model._contexts._busy


@pytest.mark.parametrize("messages, message", [
    ([], "the conversation is empty"), ([Message("user", "a"), Message("assistant", "b")], "ends with a 'assistant'"),
    ([SYSTEM], "ends with a 'system'"), ([Message("robot", "a"), Message("user", "b")], "has role 'robot'"),
    ([Message("user", "word " * 900)], "holds 700"),
])
def test_a_conversation_that_cannot_be_answered_is_refused_at_once(numpy_model: Model, messages, message: str) -> None:
    with pytest.raises(VL2Error, match=message) as error:
        numpy_model.complete(messages)
    assert error.value.hint and numpy_model.engine.backend.runs == []


def test_memory_counts_pages_that_were_written_not_room_ahead(numpy_model: Model) -> None:
    pool = ContextPool(numpy_model.engine, 10 ** 9)
    ids = np.arange(100)
    with pool.lent(ids) as context:
        context.prefill(ids, np.zeros((100, 16), np.float32), 512)
        context.keep_common(ids[:10])
        assert pool.used_bytes == 100 * POSITION_BYTES < context._cache.size_bytes

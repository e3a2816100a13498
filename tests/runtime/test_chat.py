"""Conversations of the small bundle on the NumPy backend: what is reused must change nothing."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.runtime.small_bundle import numpy_model_of
from vl2.errors import VL2Error
from vl2.prompt import Message
from vl2.runtime import Chat, GenerationOptions, Model
from vl2.runtime.answer import AnswerStream
from vl2.runtime.engine import Context
from vl2.runtime.generate import Generation

NOISE = [Image.effect_noise(size, 90) for size in ((60, 40), (33, 70), (20, 20), (60, 40))]
SHORT = GenerationOptions(max_new_tokens=6, ignore_eos=True)


def fresh(model: Model, chat: Chat, question: str, images=()) -> tuple[int, ...]:
    """The next answer of a conversation computed from nothing."""
    turn = Message("user", "<image>\n" * len(images) + question, images)
    layout = model.engine.processor.lay_out([*chat.history, turn, Message("assistant", "")])
    generation = Generation(model.engine, layout, SHORT)
    return AnswerStream(generation.pieces(Context(model.engine)), generation.progress).read().token_ids


TURNS = st.lists(st.tuples(st.sampled_from(["Where?", "And now?", "Why is it red?"]),
                           st.lists(st.sampled_from(NOISE), max_size=2)), min_size=1, max_size=4)


@settings(max_examples=25)
@given(TURNS)
def test_a_conversation_with_cache_answers_as_one_without(shared_bundle: Path, turns: list) -> None:
    model = numpy_model_of(shared_bundle)
    chat = model.chat(system="Be brief.")
    for question, images in turns:
        try:
            expected = fresh(model, chat, question, images)
        except VL2Error as error:
            assert "holds 700" in error.message
            return
        assert chat.ask(question, images, SHORT).token_ids == expected


def test_only_what_is_new_is_prefilled(numpy_model: Model) -> None:
    chat, runs = numpy_model.chat(), numpy_model.engine.backend.runs
    first = chat.ask("What is shown?", NOISE[:1], SHORT)
    runs.clear()
    second = chat.ask("And why?", options=SHORT)
    # The last token of an answer was drawn but never fed, so it is prefilled with the next question.
    assert second.reused_tokens == first.prompt_tokens + len(first.token_ids) - 1
    assert runs[0] == ("decoder", second.prompt_tokens - second.reused_tokens)
    assert "vision" not in dict(runs)


def test_a_second_image_does_not_encode_the_first_again(numpy_model: Model) -> None:
    chat, runs = numpy_model.chat(), numpy_model.engine.backend.runs
    chat.ask("What is shown?", NOISE[:1], SHORT)
    runs.clear()
    chat.ask("And here?", NOISE[2:3], SHORT)
    assert [size for graph, size in runs if graph == "vision"] == [2]


def test_a_third_image_switches_tiling_off_and_computes_all_images_anew(numpy_model: Model) -> None:
    chat, runs = numpy_model.chat(), numpy_model.engine.backend.runs
    chat.ask("One.", NOISE[:1], SHORT)
    chat.ask("Two.", NOISE[1:2], SHORT)
    runs.clear()
    third = chat.ask("Three.", NOISE[2:3], SHORT)
    assert [size for graph, size in runs if graph == "vision"] == [2, 2, 2]
    assert third.reused_tokens < 10


def test_another_image_in_the_same_place_is_not_taken_for_the_first(numpy_model: Model) -> None:
    engine, context = numpy_model.engine, Context(numpy_model.engine)
    answers = []
    for image in (NOISE[0], NOISE[3], NOISE[0]):
        layout = engine.processor.lay_out([Message("user", "<image>\nWhat?", [image]), Message("assistant", "")])
        generation = Generation(engine, layout, SHORT)
        answers.append(list(AnswerStream(generation.pieces(context), generation.progress)))
        assert generation._reused < 10
    assert answers[0] == answers[2] != answers[1]


def test_the_end_token_stands_between_turns_exactly_once(numpy_model: Model) -> None:
    chat, eos = numpy_model.chat(), numpy_model.engine.processor.eos_id
    answer = chat.ask("One.", options=SHORT)
    layout = numpy_model.engine.processor.lay_out([*chat.history, Message("user", "x"), Message("assistant", "")])
    ids = layout.input_ids.tolist()
    start = answer.prompt_tokens
    assert ids[start:start + 7] == [*answer.token_ids, eos]
    assert ids[start + 7] == numpy_model.engine.processor.tokenizer.token_to_id("<|User|>")


def test_after_a_stop_string_the_conversation_goes_on_from_what_was_shown(numpy_model: Model) -> None:
    free = numpy_model.ask("One.", options=SHORT)
    stop = free.text[len(free.text) // 2:][:2]
    chat = numpy_model.chat()
    answer = chat.ask("One.", options=GenerationOptions(6, ignore_eos=True, stop=(stop,)))
    assert answer.stop_reason == "stop"
    tokenizer = numpy_model.engine.processor.tokenizer
    assert list(chat.history[-1].token_ids) == tokenizer.encode(answer.text, add_special_tokens=False).ids
    assert fresh(numpy_model, chat, "Two.") == chat.ask("Two.", options=SHORT).token_ids


def test_a_stream_left_halfway_leaves_the_conversation_as_it_was(numpy_model: Model) -> None:
    chat = numpy_model.chat()
    chat.ask("One.", options=SHORT)
    stream = chat.stream("Two.", NOISE[:1], SHORT)
    next(stream)
    assert len(chat.history) == 2
    expected = fresh(numpy_model, chat, "Three.")
    assert chat.ask("Three.", options=SHORT).token_ids == expected
    with pytest.raises(VL2Error, match="another answer was begun"):
        list(stream)


def test_a_refused_question_leaves_the_conversation_as_it_was(numpy_model: Model) -> None:
    chat = numpy_model.chat()
    chat.ask("One.", options=SHORT)
    with pytest.raises(VL2Error, match="too long|holds 700"):
        chat.ask("word " * 800)
    assert chat.ask("Two.", options=SHORT).reused_tokens > 0


def test_history_holds_the_turns_as_they_were_said(numpy_model: Model) -> None:
    chat = numpy_model.chat(system="Be brief.")
    answer = chat.ask("What?", NOISE[:1], SHORT)
    assert [message.role for message in chat.history] == ["system", "user", "assistant"]
    assert chat.history[1].content == "<image>\nWhat?" and chat.history[2].content == answer.text


def test_an_image_that_changes_after_it_was_given_does_no_harm(numpy_model: Model) -> None:
    chat, image = numpy_model.chat(), NOISE[0].copy()
    chat.ask("One.", [image], SHORT)
    image.paste(0, (0, 0, *image.size))
    assert chat.ask("Two.", options=SHORT).reused_tokens > 80

"""A walk sees what the runtime computes, and both of its answers are the runtime's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vl2.accuracy.logits import log_softmax
from vl2.accuracy.questions import DataOptions, Question, read_questions
from vl2.accuracy.record import OpenBundle
from vl2.accuracy.walk import ANSWER, TEXT, Position, Reply, Walk, WalkOptions
from vl2.errors import VL2Error
from vl2.prompt import Message
from vl2.runtime import GenerationOptions
from vl2.runtime.engine import Context
from vl2.runtime.prompt_embeds import contents_of, embed

OPTIONS = WalkOptions(max_new_tokens=12)


@pytest.fixture
def questions(reference: OpenBundle, questions_file: Path) -> list[Question]:
    processor = reference.model.engine.processor
    return list(read_questions(questions_file, processor, DataOptions()).questions)


def asked(bundle: OpenBundle, question: Question, limit: int = 12) -> tuple[tuple[int, ...], str]:
    """Ids and text as `vl2 run` gives them."""
    turn = question.conversation()[0]
    answer = bundle.model.ask(turn.content, turn.images, GenerationOptions(max_new_tokens=limit))
    return answer.token_ids, answer.text


def walk(
    bundle: OpenBundle, question: Question, options: WalkOptions = OPTIONS, context: Context | None = None
) -> Walk:
    return Walk(context or Context(bundle.model.engine), bundle.model, question.conversation(), options)


def logits_anew(bundle: OpenBundle, question: Question, ids: list[int], cut: int | None = None) -> np.ndarray:
    """float32 [V] after the prompt (its first `cut` positions) and `ids`, in one prefill."""
    engine = bundle.model.engine
    layout = engine.processor.lay_out(question.conversation())
    embeds = np.concatenate([embed(engine, layout, 0)[:cut], engine.embeddings.lookup(np.array(ids, np.int64))])
    contents = np.concatenate([contents_of(layout, engine)[:cut], ids]).astype(np.int64)
    return Context(engine).prefill(contents, embeds, 10_000)


def test_the_greedy_answer_is_the_runtimes(reference: OpenBundle, questions: list[Question]) -> None:
    for question in questions:
        reply = walk(reference, question).greedy(lambda position: None)
        assert (reply.token_ids, reply.text) == asked(reference, question)


def test_every_answer_position_is_seen_with_its_own_logits(reference: OpenBundle, questions: list[Question]) -> None:
    seen: list[Position] = []
    reply = walk(reference, questions[0]).greedy(seen.append)
    assert [position.target for position in seen][:len(reply.token_ids)] == list(reply.token_ids)
    for index, position in enumerate(seen):
        expected = logits_anew(reference, questions[0], list(reply.token_ids[:index]))
        np.testing.assert_allclose(position.logits, expected, atol=2e-5)
        assert position.kind == ANSWER


def test_along_a_reference_the_candidate_still_gives_its_own_answer(
    reference: OpenBundle, candidate: OpenBundle, questions: list[Question]
) -> None:
    parted = 0
    for question in questions:
        recorded = walk(reference, question).greedy(lambda position: None)
        seen: list[Position] = []
        reply = walk(candidate, question).along(recorded, seen.append)
        assert (reply.token_ids, reply.text) == asked(candidate, question)
        assert [position.target for position in seen][:len(recorded.token_ids)] == list(recorded.token_ids)
        last = logits_anew(candidate, question, list(recorded.token_ids[:len(seen) - 1]))
        np.testing.assert_allclose(seen[-1].logits, last, atol=2e-5)
        parted += reply.token_ids != recorded.token_ids
    assert parted, "a candidate that never parts proves nothing"


@pytest.mark.parametrize("changed", [0, 5, 11])
def test_wherever_the_candidate_parts_it_goes_on_by_itself(
    reference: OpenBundle, questions: list[Question], changed: int
) -> None:
    own = walk(reference, questions[1]).greedy(lambda position: None)
    ids = list(own.token_ids)
    ids[changed] = (ids[changed] + 1) % 600 + 3
    reply = walk(reference, questions[1]).along(Reply(tuple(ids), "", "length"), lambda position: None)
    assert reply == own


def test_an_end_that_comes_early_or_late_is_the_candidates(reference: OpenBundle, questions: list[Question]) -> None:
    own = walk(reference, questions[0]).greedy(lambda position: None)
    early = Reply(own.token_ids[:4], "", "eos")
    assert walk(reference, questions[0]).along(early, lambda position: None) == own


def test_a_second_question_on_an_image_reuses_it_and_answers_the_same(
    reference: OpenBundle, questions: list[Question]
) -> None:
    context = Context(reference.model.engine)
    for question in questions:
        reply = walk(reference, question, context=context).greedy(lambda position: None)
        assert (reply.token_ids, reply.text) == asked(reference, question)


def test_text_positions_are_stepped_through_and_image_positions_are_not(
    reference: OpenBundle, questions: list[Question]
) -> None:
    seen: list[Position] = []
    question = questions[3]
    walk(reference, question, WalkOptions(2, prompt_text=True)).greedy(seen.append)
    layout = reference.model.engine.processor.lay_out(question.conversation())
    text = ~layout.images_seq_mask
    places = np.flatnonzero(text[:-1] & text[1:])
    found = [position for position in seen if position.kind == TEXT]
    assert [position.target for position in found] == layout.input_ids[places + 1].tolist()
    for place, position in list(zip(places.tolist(), found, strict=True))[::7]:
        np.testing.assert_allclose(position.logits, logits_anew(reference, question, [], place + 1), atol=2e-5)


def test_a_prompt_that_leaves_no_room_is_refused(reference: OpenBundle) -> None:
    conversation = [Message("user", "word " * 900), Message("assistant", "")]
    with pytest.raises(VL2Error, match="the model holds"):
        Walk(Context(reference.model.engine), reference.model, conversation, OPTIONS)


def test_probabilities_of_targets_belong_to_the_greedy_tokens(reference: OpenBundle, questions: list[Question]) -> None:
    seen: list[Position] = []
    walk(reference, questions[2]).greedy(seen.append)
    assert all(int(np.argmax(log_softmax(position.logits))) == position.target for position in seen)

"""Where questions and answers are read: targets must be the glyphs that the text names, in the sequence's own count."""

from random import Random

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="documents are drawn with matplotlib's DejaVu fonts (extra `export`)")

from vl2.nano.batches import FULL_MIX, IMAGE_START, load_processor, make_batch
from vl2.nano.documents import make_document
from vl2.nano.labels import tile_labels
from vl2.nano.pointers import NOWHERE, block_positions, character_targets, mark_cells, subject_targets


@pytest.mark.parametrize("kind", ["receipt", "form", "table", "chart"])
@pytest.mark.parametrize("crop", [(1, 1), (2, 1)])
def test_a_question_s_subject_is_found_at_its_own_glyphs(kind, crop):
    document = make_document(Random(f"subject-{kind}-{crop}"), kind, crop)
    positions, found = block_positions(document), 0
    for question in document.questions:
        for character, target in zip(
            question.question, subject_targets(document, question, positions), strict=True
        ):
            if target != NOWHERE:
                there = {m.label.lower() for m, p in zip(document.marks, positions, strict=True) if p == target}
                assert character.lower() in there, (question.question, character)
                found += 1
    assert found > 5


def test_a_word_that_the_page_has_twice_is_not_pointed_at():
    document = make_document(Random("twice"), "receipt", (1, 1))
    question = next(q for q in document.questions if q.task == "key_value" and "price" in q.question.lower())
    doubled = type(document)(
        document.kind, document.image, document.crop, document.marks, [*document.words, *document.words],
        document.questions,
    )
    assert set(subject_targets(doubled, question, block_positions(document))) == {NOWHERE}


def test_an_answer_is_read_at_its_own_glyphs():
    document = make_document(Random("answer"), "receipt", (2, 2))
    positions = block_positions(document)
    for question in document.questions:
        if question.task != "key_value":
            continue
        for character, target in zip(
            question.answer, character_targets(document, question, positions), strict=True
        ):
            there = {m.label for m, p in zip(document.marks, positions, strict=True) if p == target}
            assert target == NOWHERE or character in there


def test_places_are_the_word_boxes_that_answers_give():
    document = make_document(Random("places"), "lines", (2, 1))
    places, cells, sides = tile_labels(document).places, mark_cells(document), np.array(document.image.size * 2)
    seen = set()
    for mark, (row, column) in zip(document.marks, cells, strict=True):
        if (row, column) not in seen:
            box = np.array(document.words[mark.word].box) / sides
            assert np.allclose(places[row, column], np.clip(box, 0, 1), atol=1e-3)
        seen.add((row, column))
    assert np.isnan(places[..., 0]).sum() == places[..., 0].size - len(seen)


def test_a_batch_places_subjects_on_image_tokens_and_only_in_questions():
    batch = make_batch(load_processor(), "test-subject", 0, FULL_MIX)
    known = batch.subject != NOWHERE
    assert known.any() and not (known & (batch.question >= 0)).any()
    assert batch.subject[known].min() >= IMAGE_START

import random

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="documents are drawn with matplotlib's DejaVu fonts (extra `export`)")

from vl2.image import best_resolution
from vl2.nano.documents import KINDS, make_document
from vl2.nano.geometry import CANDIDATES, CELL, CELLS, CROPS, TILE
from vl2.nano.labels import BLANK, class_of, tile_labels
from vl2.nano.pages import new_page
from vl2.runtime.grounding import parse

CASES = [(kind, crop) for kind in KINDS for crop in CROPS]


def document(kind: str, crop: tuple[int, int], seed: int = 0):
    return make_document(random.Random(f"test-{kind}-{crop}-{seed}"), kind, crop)


@pytest.mark.parametrize(("kind", "crop"), CASES)
def test_a_document_is_the_same_for_the_same_seed(kind, crop):
    first, second = document(kind, crop), document(kind, crop)
    assert first.image.tobytes() == second.image.tobytes()
    assert first.questions == second.questions


@pytest.mark.parametrize(("kind", "crop"), CASES)
def test_the_image_is_cut_into_the_crop_that_was_asked_for(kind, crop):
    assert best_resolution(document(kind, crop).image.size, CANDIDATES) == (TILE * crop[0], TILE * crop[1])


@pytest.mark.parametrize(("kind", "crop"), CASES)
def test_every_box_lies_inside_the_image(kind, crop):
    for seed in range(3):
        page = document(kind, crop, seed)
        for item in page.words:
            x0, y0, x1, y1 = item.box
            assert -1 <= x0 < x1 <= page.image.width + 1 and -1 <= y0 < y1 <= page.image.height + 1, item
        for question in page.questions:
            for box in question.boxes:
                assert all(0 <= value <= 999 for value in box)
                assert box[0] < box[2] and box[1] < box[3]


def test_a_word_s_box_holds_all_of_its_ink_and_no_more():
    for seed in range(30):
        page = new_page(random.Random(seed), (1, 1))
        page.text((20, 60), "Qjx7", 16)
        box = page.words[0].box
        inked = np.argwhere((np.asarray(page.image) != page.background).any(-1))
        (top, left), (bottom, right) = inked.min(0), inked.max(0) + 1
        assert np.abs(np.array([left, top, right, bottom]) - box).max() <= 1.5


def test_a_location_answer_repeats_its_boxes_in_the_family_s_form():
    page = document("lines", (2, 1))
    located = [question for question in page.questions if question.task == "grounding"]
    assert located
    for question in located:
        (box,) = parse(question.answer).boxes
        assert (box.x1, box.y1, box.x2, box.y2) == question.boxes[0]
        assert box.label in question.question


def test_a_receipt_s_total_is_the_sum_of_its_prices():
    for seed in range(20):
        answers = {q.question: q.answer for q in document("receipt", (1, 2), seed).questions}
        text = next((q.answer for q in document("receipt", (1, 2), seed).questions if q.task == "ocr"), None)
        if text is None or "Total" not in text:
            continue
        amounts = [round(float(line.split()[-1]) * 100) for line in text.splitlines()[1:]]
        assert amounts[-1] == sum(amounts[:-1]), answers


def test_counts_and_colours_agree_with_the_drawn_shapes():
    for seed in range(20):
        page = document("shapes", (2, 2), seed)
        labels = [mark.label for mark in page.marks]
        for question in page.questions:
            words = question.question.rstrip("?").split()
            if question.task == "colour":
                (colour,) = {colour for kind, colour in labels if kind == words[-1]}
                assert question.answer == colour
            elif question.task == "count" and question.question.startswith("How many shapes"):
                assert question.answer == str(len(labels))


def test_highest_and_lowest_bars_agree_with_the_asked_values():
    for seed in range(30):
        questions = document("chart", (2, 1), seed).questions
        values = {q.question.rstrip("?.").split()[-1]: int(q.answer) for q in questions
                  if q.task == "chart" and "est" not in q.question}
        for question in questions:
            if question.task == "chart" and "highest" in question.question:
                assert values[question.answer] == max(values.values())
            elif question.task == "chart" and "lowest" in question.question:
                assert values[question.answer] == min(values.values())


def test_dense_labels_hold_every_glyph_in_the_cell_of_its_centre():
    page = document("word", (1, 1), 3)
    labels = tile_labels(page)
    assert labels.patches.shape == (1, 196) and labels.slots.shape == (1, CELLS * CELLS, 3)
    found = sorted(label for label in labels.slots.flatten() if label != BLANK)
    expected = sorted(class_of(mark.label) for mark in page.marks)
    assert len(found) >= len(expected) - 2 and set(found) <= set(expected)
    assert CELL * CELLS == TILE

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vl2.runtime.grounding import Box, draw, intersection_over_union, parse

GOLDENS = Path(__file__).parents[1] / "goldens"
RECORDED = json.loads((GOLDENS / "unit" / "grounding.json").read_text())
MARKS = ["<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "[", "]", "[[", "]]", ",", "1", "2.5", "999", " ", "\n", "é"]


@pytest.mark.parametrize("case", RECORDED, ids=[case["text"][:40] for case in RECORDED])
def test_boxes_and_labels_equal_those_the_original_draws(case: dict) -> None:
    found = parse(case["text"])
    size = tuple(case["image_size_wh"])
    assert [(list(box.pixels(size)), box.label) for box in found.boxes] == \
        [(drawn["box"], drawn["label"]) for drawn in case["drawn"]]


@pytest.mark.parametrize("text, problem", [
    ("<|ref|>only a name<|/ref|>", "label 'only a name' has no boxes"),
    ("<|det|>[[1,2,3,4]]<|/det|>", "boxes '[[1,2,3,4]]' have no label"),
    ("<|ref|>broken<|/ref|><|det|>[[1, 2, 3<|/det|>", "not a list in brackets"),
    ("<|ref|>a<|/ref|><|det|>[[1, 2, 3]]<|/det|>", "'[1, 2, 3]' has 3 numbers, expected 4"),
    ("<|ref|>two\nlines<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>", "<|ref|> at character 0 has no partner on its line"),
    ("<|ref|>flat<|/ref|><|det|>[1, 2, 3, 4]<|/det|>", "stands outside of boxes"),
    ("<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4], oops]<|/det|>", "'oops' stands outside of boxes"),
    ("<|ref|>a<|/ref|><|det|>[[1, 2, 3, __import__('os')]]<|/det|>", "holds something else than numbers"),
    ("<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4", "<|det|> at character 16 has no partner"),
])
def test_what_cannot_be_read_is_reported_with_its_reason(text: str, problem: str) -> None:
    assert any(problem in reported for reported in parse(text).problems), parse(text).problems


@pytest.mark.parametrize("text", ["no boxes here", "<|ref|>empty<|/ref|><|det|>[]<|/det|>",
                                  "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>"])
def test_well_formed_text_reports_nothing(text: str) -> None:
    assert parse(text).problems == ()


def test_an_answer_cut_off_in_its_second_box_keeps_the_first() -> None:
    found = parse("<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|> <|ref|>b<|/ref|><|det|>[[5, 6")
    assert found.boxes == (Box("a", 1, 2, 3, 4),)
    assert len(found.problems) == 2


def test_a_list_without_label_does_not_take_the_label_of_another() -> None:
    found = parse("<|det|>[[9, 9, 9, 9]]<|/det|><|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>")
    assert found.boxes == (Box("a", 1, 2, 3, 4),)


@given(st.lists(st.sampled_from(MARKS), max_size=30).map("".join))
def test_the_parser_never_raises_and_never_loses_a_mark(text: str) -> None:
    found = parse(text)
    assert found.boxes or found.problems or "[[" not in text or "<|det|>" not in text
    for box in found.boxes:
        box.pixels((640, 480))


@given(st.text())
def test_any_text_is_parsed_and_boxes_come_only_from_marks(text: str) -> None:
    found = parse(text)
    assert not found.boxes or ("<|ref|>" in text and "<|det|>" in text)


CORNER = st.integers(0, 999)
BOXES = st.lists(st.tuples(CORNER, CORNER, CORNER, CORNER))


@given(st.lists(st.tuples(st.text("abc ", min_size=1), BOXES), max_size=4))
def test_what_is_written_in_the_format_is_read_back(answer: list) -> None:
    text = "".join(f"<|ref|>{label}<|/ref|><|det|>[{', '.join(str(list(box)) for box in boxes)}]<|/det|>"
                   for label, boxes in answer)
    found = parse(text)
    assert found.boxes == tuple(Box(label, *box) for label, boxes in answer for box in boxes)
    assert found.problems == ()


def test_full_scale_is_one_past_the_last_pixel() -> None:
    assert Box("", 0, 0, 999, 999).pixels((385, 383)) == (0, 0, 385, 383)


def test_drawing_outlines_the_box_and_leaves_the_original_alone() -> None:
    image = Image.new("L", (100, 80))
    drawn = draw(image, [Box("cup", 100, 500, 600, 900)])
    x1, y1, _, _ = Box("cup", 100, 500, 600, 900).pixels(image.size)
    assert drawn.getpixel((x1, y1)) == (255, 0, 0)
    assert drawn.getpixel((99, 0)) == (0, 0, 0)
    assert image.getextrema() == (0, 0)


@pytest.mark.parametrize("box", [Box("swapped", 900, 800, 100, 200), Box("outside", 0, 0, 1200, 1000),
                                 Box("红色", 0, 0, 10, 10), Box("", 5, 5, 5, 5)])
def test_odd_boxes_are_drawn_without_complaint(box: Box) -> None:
    drawn = draw(Image.new("RGB", (64, 48)), [box] * 7)
    assert drawn.size == (64, 48) and drawn.getbbox() is not None


def test_a_box_far_outside_is_drawn_at_once_and_looks_as_one_just_outside() -> None:
    """One of 999,999,999 took minutes: Pillow goes over each pixel of the outline."""
    image, far = Image.new("RGB", (64, 48)), 999_999_999
    for corners in ((0, 0, far, far), (-far, 300, 500, far), (far, far, far, far), (-far, -far, far, far)):
        near = tuple(min(max(corner, -900), 1900) for corner in corners)
        drawn, expected = (draw(image, [Box("", *edges)]) for edges in (corners, near))
        assert drawn.tobytes() == expected.tobytes()


@pytest.mark.parametrize("corners, told", [([0, 0, 999, 999], False), ([0, 0, 1000, 5], True), ([-1, 0, 5, 5], True),
                                           ([0, 0, 999.5, 5], True), ([0, 0, 999_999_999, 5], True)])
def test_a_box_outside_of_the_scale_is_kept_and_told(corners: list, told: bool) -> None:
    found = parse(f"<|ref|>a<|/ref|><|det|>[{corners}]<|/det|>")
    assert found.boxes == (Box("a", *corners),)
    assert found.problems == ((f"boxes of 'a': {corners} leaves 0…999",) if told else ())


def test_a_box_becomes_json_with_its_pixels() -> None:
    assert Box("a", 0, 0, 999, 500).to_dict((100, 100)) == {"label": "a", "box": [0, 0, 999, 500],
                                                            "pixels": [0, 0, 100, 50]}
    assert "pixels" not in Box("a", 0, 0, 1, 1).to_dict()


def test_intersection_over_union_of_known_boxes():
    assert intersection_over_union((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert intersection_over_union((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert intersection_over_union((0, 0, 10, 10), (10, 0, 20, 10)) == 0

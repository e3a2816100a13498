"""Each task metric against values worked out by hand from its definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl2.accuracy.boxes import is_valid
from vl2.accuracy.metrics import METRICS, metric_of
from vl2.accuracy.text_metrics import Score, choice
from vl2.accuracy.vqa import normalised_answer
from vl2.runtime.grounding import intersection_over_union


def figure(metric: str, prediction: str, *references: str) -> float:
    score = METRICS[metric].score(prediction, references)
    return score.value / score.weight


def located(*boxes: tuple[int, ...], label: str = "") -> str:
    return f"<|ref|>{label}<|/ref|><|det|>{[list(box) for box in boxes]}<|/det|>"


CASES = [
    ("exact", " Hello  World ", ["hello world"], 1), ("exact", "3.5", ["3.50"], 0), ("exact", "no", ["yes", "No"], 1),
    ("choice", "B", ["B"], 1), ("choice", "The answer is (C).", ["C"], 1), ("choice", "b)", ["B"], 1),
    ("choice", "A cat", ["B"], 0), ("choice", "Bread", ["B"], 0), ("choice", "none", ["B"], 0),
    # Distance 1 of 5 characters; 2 of 4 is the bound, where the official DocVQA gives nought.
    ("anls", "Helo!", ["helo?"], 0.8), ("anls", "abcd", ["abxy"], 0), ("anls", "abc", ["abxy"], 0),
    ("anls", "a  B", ["a b", "zzz"], 1), ("anls", "", ["abc"], 0),
    ("relaxed", "104.9", ["100"], 1), ("relaxed", "105", ["100"], 1), ("relaxed", "105.1", ["100"], 0),
    ("relaxed", "50%", ["0.5"], 1), ("relaxed", "51 %", ["0.5"], 1), ("relaxed", "0", ["0"], 1),
    ("relaxed", "0.01", ["0"], 0),
    ("relaxed", "Blue", ["blue"], 1), ("relaxed", "-9.6", ["-10"], 1), ("relaxed", "inf", ["inf"], 1),
    ("vqa", "yes", ["yes"] * 10, 1),
    # Three people agree: left out once each of the three has two left, else three.
    ("vqa", "red", ["red"] * 3 + ["blue"] * 7, (3 * 2 / 3 + 7) / 10),
    ("vqa", "a Red.", ["red"] + ["blue"] * 9, 9 / 30), ("vqa", "two", ["2"] * 10, 1), ("vqa", "x", ["y"] * 10, 0),
    ("contains", "The total is 12.50\nEUR", ["total is 12.50 eur"], 1), ("contains", "12", ["12.50"], 0),
    ("contains_formula", "x ^ 2 + Y", ["x^2+Y"], 1), ("contains_formula", "x^2+y", ["x^2+Y"], 0),
    ("cer", "abd", ["abc"], 2 / 3), ("cer", "ﬁne", ["fine"], 1), ("cer", "xxxxxx", ["ab"], -2),
    ("wer", "the dog sat", ["the cat sat"], 2 / 3), ("wer", "", ["one two"], 0),
    ("wer", "a b", ["a c", "a b c"], 2 / 3),
    ("iou", located((0, 0, 100, 100)), [located((0, 0, 100, 100))], 1),
    # 100 × 50 of 100 × 150 is a third; 100 × 70 of 100 × 130 is more than a half.
    ("iou", located((0, 50, 100, 150)), [located((0, 0, 100, 100))], 0),
    ("iou", located((0, 30, 100, 130)), [located((0, 0, 100, 100))], 1),
    ("iou", located((0, 0, 9, 9), (20, 20, 30, 30)), [located((0, 0, 9, 9), (20, 20, 30, 30))], 1),
    ("iou", located((20, 20, 30, 30), (0, 0, 9, 9)), [located((0, 0, 9, 9), (20, 20, 30, 30))], 0),
    ("iou", located((0, 0, 9, 9), (20, 20, 30, 30)), [located((0, 0, 9, 9))], 0),
    ("iou", located((0, 0, 9, 9), label="Milk"), [located((0, 0, 9, 9), label="Milk")], 1),
    ("iou", located((0, 0, 9, 9), label="Mlik"), [located((0, 0, 9, 9), label="Milk")], 0),
    ("iou", located((0, 0, 9, 9), label="Milk"), [located((0, 0, 9, 9))], 1),
    ("iou", "nowhere", [located((0, 0, 9, 9))], 0),
]


@pytest.mark.parametrize("metric, prediction, references, expected", CASES)
def test_values_worked_out_by_hand(metric: str, prediction: str, references: list[str], expected: float) -> None:
    assert figure(metric, prediction, *references) == pytest.approx(expected, abs=1e-12)


def test_every_metric_has_a_case() -> None:
    assert {case[0] for case in CASES} == METRICS.keys()


@pytest.mark.parametrize("metric", sorted(METRICS.keys() - {"vqa", "iou", "choice", "cer", "wer"}))
@given(text=st.text("aA1. %\n", min_size=1, max_size=8), others=st.lists(st.text("ab1 ", min_size=1), max_size=3))
def test_the_reference_itself_is_right_among_any_others(metric: str, text: str, others: list[str]) -> None:
    assert figure(metric, text, *others, text) == 1


@given(st.lists(st.sampled_from(["red", "blue", "the red", "2"]), min_size=4, max_size=10),
       st.sampled_from(["red", "blue", "two"]))
def test_vqa_accuracy_is_the_mean_over_the_subsets(references: list[str], prediction: str) -> None:
    subsets = [references[:i] + references[i + 1:] for i in range(len(references))]
    answer = normalised_answer(prediction)
    expected = sum(min(1, sum(normalised_answer(r) == answer for r in subset) / 3) for subset in subsets) / len(subsets)
    assert figure("vqa", prediction, *references) == pytest.approx(expected)


@pytest.mark.parametrize("text, expected", [
    ("The Dog's bone", "dogs bone"), ("don't", "dont"), ("1,000 people", "1000 people"), ("3.5", "3.5"),
    ("yes.", "yes"), ("red/blue", "red blue"), ("what ?", "what"), ("None", "0"), ("ten", "10"),
    ("red,blue", "red blue"),
])
def test_answers_are_normalised_as_vqa_does(text: str, expected: str) -> None:
    assert normalised_answer(text) == expected


def test_error_rates_weigh_by_the_length_of_the_reference() -> None:
    assert METRICS["cer"].score("abcx", ["abcd"]) == Score(3, 4)
    assert METRICS["wer"].score("one", ["one two three"]) == Score(1, 3)


@pytest.mark.parametrize("text, valid", [
    (located((0, 0, 9, 9)), True), ("no box", False), (located((9, 0, 9, 9)), False), (located((0, 0, 9, 1000)), False),
    (located((0, 0, 9, 9)) + "<|det|>", False), ("<|ref|>x<|/ref|><|det|>[[1, 2, 3]]<|/det|>", False),
])
def test_boxes_are_valid_with_an_area_inside_the_image(text: str, valid: bool) -> None:
    assert is_valid(text) is valid


@given(st.tuples(*[st.integers(0, 40)] * 4), st.tuples(*[st.integers(0, 40)] * 4))
def test_intersection_over_union_counts_cells(a: tuple, b: tuple) -> None:
    cells = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a, b)]
    common = len(cells[0] & cells[1])
    assert intersection_over_union(a, b) == pytest.approx(common / len(cells[0] | cells[1]) if common else 0)


@pytest.mark.parametrize("names, choices, boxes, expected", [
    (("ocr", "heldout"), False, False, "exact"), (("x", "DocVQA_VAL"), False, False, "anls"),
    (("x", "InfoVQA_VAL"), False, False, "anls"), (("human", "ChartQA_TEST"), False, False, "relaxed"),
    (("x", "TextVQA_VAL"), False, False, "vqa"), (("Scene Text", "OCRBench"), False, False, "contains"),
    (("Handwritten Mathematical Expression Recognition", "OCRBench"), False, False, "contains_formula"),
    (("x", "MMBench"), True, False, "choice"), (("anything", "x"), False, True, "iou"),
])
def test_a_row_without_a_metric_gets_its_tasks(names: tuple, choices: bool, boxes: bool, expected: str) -> None:
    assert metric_of(names, choices, boxes) == expected


def test_a_choice_is_any_letter_or_one_of_those_that_the_row_has() -> None:
    assert METRICS["choice"].score("Z.", ["z"]) == Score(1.0)
    assert choice("I say (B)", ["B"], "ABCD") == choice("b.", ["B"], "ABCD") == Score(1.0)
    assert choice("i)", ["B"], "ABCD") == choice("E", ["E"], "ABCD") == Score(0.0)

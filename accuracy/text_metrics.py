"""Scores of one answer against the texts that count as right (definitions: VLMEvalKit's and the data sets' own).

Each takes the prediction and a list of references, which is not empty, and gives a Score.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vl2.accuracy.edit_distance import edit_distance, similarity

_RELATIVE_BOUND = 0.05
_ANLS_BOUND = 0.5


class Score(NamedTuple):
    """A task's figure is Σ value / Σ weight over its rows; the weight is 1 but for error rates."""

    value: float
    weight: float = 1.0


def normalised(text: str) -> str:
    """Lower case, single spaces, nothing around."""
    return " ".join(text.lower().split())


def exact(prediction: str, references: Sequence[str]) -> Score:
    """1 where the normalised texts are equal."""
    return Score(float(normalised(prediction) in map(normalised, references)))


def choice(prediction: str, references: Sequence[str], letters: str = string.ascii_uppercase) -> Score:
    """Multiple choice: 1 where the first of the row's `letters` that stands alone is a reference's.

    Only its own: where A to D can be chosen, the I of "I think it is B" is no choice.
    """
    given = {letter_in(reference, letters) for reference in references} - {None}
    return Score(float(letter_in(prediction, letters) in given))


def letter_in(text: str, letters: str) -> str | None:
    """The first capital of `letters` that stands alone in a text, or the one that the whole text is; None without."""
    found = re.search(rf"(?<![A-Za-z])[{letters}](?![A-Za-z'])", text)
    return found[0] if found else bare_letter(text, letters)


def bare_letter(text: str, letters: str) -> str | None:
    """The one of `letters` that is the whole text, such as `b)` or `(C).`; None without."""
    found = re.fullmatch(r"\s*\(?([A-Za-z])\)?[.:]?\s*", text)
    return found[1].upper() if found and found[1].upper() in letters else None


def anls(prediction: str, references: Sequence[str]) -> Score:
    """1 − NL where the normalised distance NL is below 0.5, else 0; the best reference counts (DocVQA, InfoVQA)."""
    answer = normalised(prediction)
    # The distance is compared, not the similarity: VLMEvalKit keeps 0.5 at equality, the official DocVQA does not.
    losses = [1 - similarity(answer, normalised(reference)) for reference in references]
    return Score(max(1 - loss if loss < _ANLS_BOUND else 0.0 for loss in losses))


def relaxed(prediction: str, references: Sequence[str]) -> Score:
    """ChartQA: numbers within 5 % of the reference, other texts equal in lower case."""
    return Score(float(any(_relaxed_equal(prediction.strip(), reference.strip()) for reference in references)))


def _relaxed_equal(prediction: str, reference: str) -> bool:
    given, expected = _number(prediction), _number(reference)
    if given is not None and expected:
        return abs(given - expected) <= _RELATIVE_BOUND * abs(expected)
    return prediction.lower() == reference.lower()


def _number(text: str) -> float | None:
    plain = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(%?)", text)
    return float(plain[1]) / (100 if plain[2] else 1) if plain else None


def contains(prediction: str, references: Sequence[str]) -> Score:
    """OCRBench: 1 where a reference stands within the prediction, in lower case and line breaks as spaces."""
    text = _one_line(prediction)
    return Score(float(any(_one_line(reference) in text for reference in references)))


def _one_line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def contains_formula(prediction: str, references: Sequence[str]) -> Score:
    """OCRBench's handwritten formulas: spaces do not count, case does."""
    text = re.sub(r"\s", "", prediction)
    return Score(float(any(re.sub(r"\s", "", reference) in text for reference in references)))


def character_accuracy(prediction: str, references: Sequence[str]) -> Score:
    """1 − CER, micro-averaged: the weight is the reference's length after NFKC. Below 0 where errors outnumber it."""
    return _error_rate(prediction, references, list)


def word_accuracy(prediction: str, references: Sequence[str]) -> Score:
    """1 − WER, micro-averaged over words between blanks."""
    return _error_rate(prediction, references, str.split)


def _error_rate(prediction: str, references: Sequence[str], units: Callable[[str], list[str]]) -> Score:
    given = units(unicodedata.normalize("NFKC", prediction).strip())
    scores = []
    for reference in references:
        expected = units(unicodedata.normalize("NFKC", reference).strip())
        scores.append(Score(len(expected) - edit_distance(expected, given), len(expected)))
    return max(scores, key=lambda score: score.value / score.weight if score.weight else float("-inf"))

"""VQA accuracy (TextVQA, VQAv2): ten people answered, an answer is right as far as three of them gave it.

Both sides are normalised as https://visualqa.org/evaluation.html describes, with one difference: it writes the
apostrophe into contractions that lack it, from a list; here apostrophes between letters are dropped on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vl2.accuracy.text_metrics import Score

LEAST_ANSWERS = 4  # with fewer, no answer could reach 1
_AGREEING = 3
_NUMBERS = {word: str(number) for number, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = r';/[]"{}()=+\_-><@`,?!'


def vqa_accuracy(prediction: str, references: Sequence[str]) -> Score:
    """The mean of min(1, matches / 3) over the subsets that leave one reference out."""
    answer = normalised_answer(prediction)
    matches = [normalised_answer(reference) == answer for reference in references]
    agreeing = sum(matches)
    return Score(sum(min(1.0, (agreeing - match) / _AGREEING) for match in matches) / len(matches))


def normalised_answer(text: str) -> str:
    """Lower case; no articles, apostrophes, commas or full stops outside numbers; number words as digits."""
    given = text = " ".join(text.split())
    for mark in _PUNCTUATION:
        # A mark inside a word parts it, unless the text also has it at a word's edge or a comma within a number.
        whole = f"{mark} " in given or f" {mark}" in given or re.search(r"\d,\d", given)
        text = text.replace(mark, "" if whole else " ")
    text = re.sub(r"\.(?!\d)", "", text).lower()
    text = re.sub(r"(?<=[a-z])'(?=[a-z])", "", text)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(word for word in words if word not in _ARTICLES)

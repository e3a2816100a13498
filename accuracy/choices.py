"""The choices of a multiple-choice row: which letters it has, and which of them its answers mean."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vl2.accuracy.text_metrics import bare_letter, letter_in, normalised

_ALL = string.ascii_uppercase
_USUAL_LAST = "H"


@dataclass(frozen=True)
class Choices:
    """texts: by letter, from the row's own columns or fields A to Z; empty where its question holds them in its text.

    letters: those that an answer may be.
    """

    texts: Mapping[str, str]
    letters: str

    def letter_of(self, answer: str) -> str | None:
        """The letter that one of the row's answers means: it alone, by its choice's text, or within the answer.

        In this order: where A is "Vitamin C" and B "Vitamin A", the answer "Vitamin A" is B.
        """
        by_text = (letter for letter, text in self.texts.items() if normalised(text) == normalised(answer))
        return bare_letter(answer, self.letters) or next(by_text, None) or letter_in(answer, self.letters)

    def fault_of(self, answers: Sequence[str]) -> str | None:
        """What is wrong with answers of which one means no letter."""
        strange = next((answer for answer in answers if self.letter_of(answer) is None), None)
        if strange is None:
            return None
        return f"its metric is 'choice', its answer {strange[:40]!r} is none of its choices {', '.join(self.letters)}"


def choices_of(facts: Mapping[str, Any], answers: Sequence[str]) -> Choices:
    """The choices of a row with these fields and answers.

    Without choices of its own it has A to H, or more where an answer is: with all letters every "I think" would be I.
    """
    texts = {letter: str(facts[letter]) for letter in _ALL if letter in facts}
    last = max([_USUAL_LAST, *filter(None, (bare_letter(answer, _ALL) for answer in answers))])
    return Choices(texts, "".join(texts) or _ALL[:_ALL.index(last) + 1])

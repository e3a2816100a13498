"""Boxes with x1 ≤ x2 and y1 ≤ y2: what a grammar of digits would need a rule for every number for."""

from __future__ import annotations

import numpy as np

from vl2.runtime.detokenize import TokenBytes
from vl2.special_tokens import DET_CLOSE, DET_OPEN

_DIGITS = 3


class BoxOrder:
    """Follows an answer in which boxes are well formed, and takes away tokens that would reverse two corners."""

    def __init__(self, token_bytes: TokenBytes):
        self._bytes = token_bytes
        self._box: str | None = None  # the unfinished box, None outside of a list

    def push(self, token: int) -> None:
        """Takes the next token of the answer."""
        text = self._text(token)
        if text in (DET_OPEN, DET_CLOSE):
            self._box = "" if text == DET_OPEN else None
        elif self._box is not None:
            self._box = (self._box + text).rpartition("[")[2]

    def narrow(self, allowed: np.ndarray) -> None:
        """Clears tokens in `allowed` bool [V], in place; inside a list the grammar leaves few to look at."""
        if self._box is None:
            return
        for token in np.flatnonzero(allowed):
            boxes = (self._box + self._text(int(token))).split("[")
            allowed[token] = all(map(can_be_ordered, boxes))

    def _text(self, token: int) -> str:
        return self._bytes[token].decode("utf-8", "replace")


def can_be_ordered(box: str) -> bool:
    """Whether the text after a box's opening bracket, such as `10, 20, 3`, can go on to ordered corners."""
    inner, closed, _ = box.partition("]")
    numbers = [number.strip() for number in inner.split(",")]
    for low, high in ((0, 2), (1, 3)):
        if len(numbers) > high and numbers[high]:
            finished = bool(closed) or len(numbers) > high + 1
            if _largest(numbers[high], finished) < int(numbers[low]):
                return False
    return True


def _largest(number: str, finished: bool) -> int:
    """The largest number that begins with these digits; zero stands alone."""
    return int(number) if finished or number == "0" else int(number + "9" * (_DIGITS - len(number)))

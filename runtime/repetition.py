"""The repetition guard: knows an answer that goes round in circles from one that repeats itself with reason.

Rule: the answer ends in one block of tokens that stands there at least 6 times in a row, 256 tokens or more together.
Rows of a table with equal values differ in what stands beside them, boxes in their numbers; a run that long of exactly
the same ids is no table that a person would write. Shorter loops end with max_new_tokens.
"""

from __future__ import annotations

import numpy as np

LEAST_REPEATS = 6
LEAST_TOKENS = 256
LONGEST_BLOCK = 512


class RepetitionGuard:
    """Watches one answer, token by token, in constant memory and time a token."""

    def __init__(self):
        self._ids = np.full(LONGEST_BLOCK, -1, np.int64)  # the newest first
        self._runs = np.zeros(LONGEST_BLOCK, np.int64)
        self._needed = np.array([_needed(size) for size in range(1, LONGEST_BLOCK + 1)])

    def push(self, token: int) -> int | None:
        """The length of the block that the answer with this token goes round in, the shortest; None where it does not.

        runs[p - 1] counts the last tokens that equal the one p before each: a block of p stands there in full
        (runs + p) / p times.
        """
        self._runs = np.where(self._ids == token, self._runs + 1, 0)
        self._ids[1:] = self._ids[:-1]
        self._ids[0] = token
        found = np.flatnonzero(self._runs >= self._needed)
        return int(found[0]) + 1 if len(found) else None


def _needed(size: int) -> int:
    """How many tokens must equal the one `size` before them."""
    return max(LEAST_REPEATS * size, LEAST_TOKENS) - size

"""Levenshtein distance, fast enough for whole pages of text without a compiled package."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Insertions, deletions and substitutions that turn `a` into `b`.

    A column of the table is one whole number of len(a) bits, so a page of 2,000 characters takes 2,000 steps.
    Source: Hyyrö, "A Bit-Vector Algorithm for Computing Levenshtein and Damerau Edit Distances" (2003), figure 3.
    """
    if not a:
        return len(b)
    places: dict[Hashable, int] = defaultdict(int)
    for index, symbol in enumerate(a):
        places[symbol] |= 1 << index
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = full, 0, len(a)  # cells one more, and one less, than the cell above them
    for symbol in b:
        match = places.get(symbol, 0)
        same = (((match & up) + up) ^ up) | match | down
        right_more, right_less = down | (full & ~(same | up)), up & same
        distance += bool(right_more & last) - bool(right_less & last)
        right_more = (right_more << 1 | 1) & full
        right_less = (right_less << 1) & full
        up, down = right_less | (full & ~(same | right_more)), right_more & same
    return distance


def similarity(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """1 − distance over the longer length; 1 for two empty sequences."""
    longest = max(len(a), len(b))
    return 1.0 - edit_distance(a, b) / longest if longest else 1.0

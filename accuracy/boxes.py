"""Grounding: do the boxes of an answer overlap the expected ones, and are they boxes at all."""

from __future__ import annotations

from collections.abc import Sequence

from vl2.accuracy.text_metrics import Score
from vl2.runtime.grounding import Box, intersection_over_union, parse

IOU_BOUND = 0.5
_FULL_SCALE = 999


def boxes_found(prediction: str, references: Sequence[str]) -> Score:
    """1 where the answer has as many boxes as a reference and each overlaps its own with IoU ≥ 0.5, in order.

    Labels count where the reference has them: `<|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2]]<|/det|>`.
    """
    found = parse(prediction).boxes
    return Score(float(any(_all_found(found, parse(reference).boxes) for reference in references)))


def _all_found(found: Sequence[Box], expected: Sequence[Box]) -> bool:
    if not expected or len(found) != len(expected):
        return False
    return all((not b.label or a.label == b.label) and intersection_over_union(a.corners, b.corners) >= IOU_BOUND
               for a, b in zip(found, expected, strict=True))


def is_valid(prediction: str) -> bool:
    """Whether the answer holds boxes, nothing of it is unreadable, and each has an area within 0…999."""
    grounding = parse(prediction)
    return bool(grounding.boxes) and not grounding.problems and all(
        0 <= box.x1 < box.x2 <= _FULL_SCALE and 0 <= box.y1 < box.y2 <= _FULL_SCALE for box in grounding.boxes)

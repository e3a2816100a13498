"""Which questions lost most."""

from __future__ import annotations

from typing import Any

import numpy as np

from vl2.accuracy.comparison import Comparison
from vl2.accuracy.walk import ANSWER

ROUNDING = 1e-9  # nats: float32 sums in another order cost less than 1e-10
_SHOWN, _LONGEST = 10, 120


def worst_questions(comparison: Comparison) -> list[dict[str, Any]]:
    """The questions with the largest mean KLD over their answer positions, worst first; none whose loss is rounding."""
    positions, count = comparison.positions, len(comparison.replies)
    chosen = positions.kind == ANSWER
    sums = np.bincount(positions.question[chosen], positions.kld[chosen], count)
    means = sums / np.maximum(np.bincount(positions.question[chosen], minlength=count), 1)
    worst = [index for index in np.argsort(-means, kind="stable")[:_SHOWN] if means[index] > ROUNDING]
    return [_row(comparison, int(index), float(means[index])) for index in worst]


def _row(comparison: Comparison, index: int, kld: float) -> dict[str, Any]:
    question, (reference, candidate) = comparison.data.questions[index], comparison.replies[index]
    return {"source": question.sample.source, "task": question.task, "kld": kld,
            "expected": _short(question.answers[0] if question.answers else ""),
            "reference": _short(reference.text), "candidate": _short(candidate.text)}


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"

"""The task level: what the answers are worth, and whether the difference is more than chance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vl2.accuracy.boxes import is_valid
from vl2.accuracy.comparison import Comparison
from vl2.accuracy.metrics import METRICS
from vl2.accuracy.questions import Question
from vl2.accuracy.statistics import mcnemar, paired_bootstrap, smallest_visible_effect
from vl2.accuracy.text_metrics import Score


@dataclass(frozen=True)
class ScoredRow:
    """A question with both answers' texts and scores; right: reference and candidate, for McNemar's test."""

    question: Question
    texts: tuple[str, str]
    scores: tuple[Score, Score]
    right: tuple[bool, bool]


def scored_rows(comparison: Comparison) -> list[ScoredRow]:
    """The rows that have answers to compare with, in order."""
    pairs = zip(comparison.data.questions, comparison.replies, strict=True)
    return [_scored(question, (reference.text, candidate.text))
            for question, (reference, candidate) in pairs if question.answers]


def _scored(question: Question, texts: tuple[str, str]) -> ScoredRow:
    scores = tuple(question.score(text) for text in texts)
    right = tuple(score.value >= METRICS[question.metric].right_from * score.weight for score in scores)
    return ScoredRow(question, texts, scores, right)


def task_figures(comparison: Comparison) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """A dict for each task and metric, and one over all; None where no row has an answer to compare with."""
    rows = scored_rows(comparison)
    if not rows:
        return [], None
    by_task: dict[tuple[str, str], list[ScoredRow]] = defaultdict(list)
    for row in rows:
        by_task[row.question.task, row.question.metric].append(row)
    tasks = [{"task": task, **_figures(metric, found)} for (task, metric), found in by_task.items()]
    recoveries = [task["recovery_percent"] for task in tasks if task["recovery_percent"] is not None]
    # Values of different metrics are not added up; right and wrong are.
    right = [ScoredRow(row.question, row.texts, tuple(Score(float(r)) for r in row.right), row.right) for row in rows]
    return tasks, {
        **_figures(None, right),
        "mean_recovery_percent": float(np.mean(recoveries)) if recoveries else None,
        "worst_recovery_percent": min(recoveries, default=None),
    }


def _figures(metric: str | None, rows: Sequence[ScoredRow]) -> dict[str, Any]:
    values = np.array([(row.scores[0].value, row.scores[1].value, row.scores[0].weight) for row in rows])
    names = {name: index for index, name in enumerate(dict.fromkeys(row.question.image for row in rows))}
    clusters = np.array([names[row.question.image] for row in rows])
    reference, candidate, weight = (float(total) for total in values.sum(axis=0))
    weight = max(weight, 1.0)  # references without a single character weigh nothing and score 0
    intervals = paired_bootstrap(values, clusters)
    right = np.array([row.right for row in rows])
    share = values[:, :2] / np.maximum(values[:, 2:], 1.0)
    return {
        "metric": "right" if metric is None else METRICS[metric].name, "questions": len(rows), "images": len(names),
        "reference_percent": 100 * reference / weight, "candidate_percent": 100 * candidate / weight,
        "difference_points": 100 * (candidate - reference) / weight,
        # No row with a weight: 0 / 1 above, in every resample.
        "difference_95": [0.0, 0.0] if intervals.difference is None else _percent(intervals.difference),
        "recovery_percent": 100 * candidate / reference if reference > 0 else None,
        "recovery_95": None if intervals.ratio is None else _percent(intervals.ratio),
        "mcnemar": asdict(mcnemar(right[:, 0], right[:, 1])),
        "smallest_visible_points": 100 * smallest_visible_effect(share[:, 1] - share[:, 0], clusters),
        **(_validity(rows) if metric == "iou" else {}),
    }


def _percent(interval: Any) -> list[float]:
    return [100 * interval.low, 100 * interval.high]


def _validity(rows: Sequence[ScoredRow]) -> dict[str, float]:
    """Per cent of the answers that are boxes at all."""
    valid = np.array([[is_valid(text) for text in row.texts] for row in rows]).mean(axis=0)
    return {"reference_valid_percent": 100 * float(valid[0]), "candidate_valid_percent": 100 * float(valid[1])}

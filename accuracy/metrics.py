"""The table of task metrics, and which of them a row gets that names none."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vl2.accuracy import text_metrics
from vl2.accuracy.boxes import boxes_found
from vl2.accuracy.text_metrics import Score
from vl2.accuracy.vqa import vqa_accuracy


@dataclass(frozen=True)
class Metric:
    """score: of a prediction against references; right_from: the row's figure from which it counts as right in
    McNemar's test; name: for reports."""

    score: Callable[[str, Sequence[str]], Score]
    name: str
    right_from: float = 0.5


METRICS: Mapping[str, Metric] = {
    "exact": Metric(text_metrics.exact, "exact match"),
    "choice": Metric(text_metrics.choice, "multiple choice"),
    "anls": Metric(text_metrics.anls, "ANLS"),
    "relaxed": Metric(text_metrics.relaxed, "relaxed accuracy"),
    "vqa": Metric(vqa_accuracy, "VQA accuracy"),
    "contains": Metric(text_metrics.contains, "contains"),
    "contains_formula": Metric(text_metrics.contains_formula, "contains, formulas"),
    "cer": Metric(text_metrics.character_accuracy, "1 − CER", right_from=1.0),
    "wer": Metric(text_metrics.word_accuracy, "1 − WER", right_from=1.0),
    "iou": Metric(boxes_found, "box IoU ≥ 0.5"),
}

# Pattern in the lower-case task or file name → metric; the first that is found counts.
_BY_TASK: tuple[tuple[str, str], ...] = (
    (r"handwritten mathematical", "contains_formula"),
    (r"ocr.?bench", "contains"),
    (r"docvqa|info(graphic)?s?.?vqa", "anls"),
    (r"chartqa", "relaxed"),
    (r"textvqa|vqa.?v2|okvqa", "vqa"),
    (r"refcoco|grounding", "iou"),
)
_FALLBACK = "exact"


def metric_of(names: Sequence[str], has_choices: bool, has_boxes: bool) -> str:
    """The metric of a row that names none: by its boxes, its choices, then its task's and its file's names."""
    if has_boxes:
        return "iou"
    if has_choices:
        return "choice"
    text = " ".join(names).lower()
    return next((metric for pattern, metric in _BY_TASK if re.search(pattern, text)), _FALLBACK)

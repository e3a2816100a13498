"""The bounds a user gives, and whether a report is within them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """max_kld: of the mean over answer positions, in nats; min_recovery: of every task, in per cent."""

    max_kld: float | None = None
    min_recovery: float | None = None


@dataclass(frozen=True)
class BoundCheck:
    """bound: the option; found: what it is held against, None where nothing can be told; then it does not hold."""

    bound: str
    limit: float
    found: float | None
    holds: bool
    detail: str


def check_bounds(report: dict[str, Any], bounds: Bounds) -> list[BoundCheck]:
    """A check for each bound that was given."""
    checks = []
    if bounds.max_kld is not None:
        checks.append(_check_kld(report["logits"]["answer"]["kld"], bounds.max_kld))
    if bounds.min_recovery is not None:
        checks.append(_check_recovery(report["tasks"], bounds.min_recovery))
    return checks


def _check_kld(kld: dict[str, Any], limit: float) -> BoundCheck:
    """Against the upper bound: a loss that the recording is too coarse to rule out is not passed."""
    detail = f"mean KLD {kld['mean']:.3g}"
    if kld["mean_at_most"] > kld["mean"]:
        detail += f", at most {kld['mean_at_most']:.3g}"
        if kld["mean"] <= limit < kld["mean_at_most"]:
            detail += "; a recording with a larger --top would tell"
    return BoundCheck("--max-kld", limit, kld["mean_at_most"], kld["mean_at_most"] <= limit, detail)


def _check_recovery(tasks: list[dict[str, Any]], limit: float) -> BoundCheck:
    found = [(task["recovery_percent"], task["task"]) for task in tasks if task["recovery_percent"] is not None]
    if not found:
        return BoundCheck("--min-recovery", limit, None, False, "the reference scores 0 on every task")
    worst, task = min(found)
    untold = len(tasks) - len(found)
    detail = f"worst task: {task}; mean {sum(value for value, _ in found) / len(found):.2f} %"
    if untold:
        detail += f"; {untold} where the reference scores 0 say nothing"
    return BoundCheck("--min-recovery", limit, worst, worst >= limit, detail)

"""The bounds a user gives, and whether a report is within them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vl2.errors import VL2Error


@dataclass(frozen=True)
class Bounds:
    """max_kld: of the mean over answer positions, in nats; min_recovery: of every task, in per cent."""

    max_kld: float | None = None
    min_recovery: float | None = None


@dataclass(frozen=True)
class BoundCheck:
    """bound: the option; found: what it is held against."""

    bound: str
    limit: float
    found: float
    holds: bool
    detail: str


def check_bounds(report: dict[str, Any], bounds: Bounds) -> list[BoundCheck]:
    """A check for each bound that was given. Raises VL2Error for --min-recovery where no recovery can be told."""
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
        raise VL2Error("--min-recovery was given, but no task has a score of the reference to recover",
                       "give data whose rows have answers, or leave the bound out")
    worst, task = min(found)
    untold = len(tasks) - len(found)
    detail = f"worst task: {task}" + (f"; {untold} where the reference scores 0 say nothing" if untold else "")
    return BoundCheck("--min-recovery", limit, worst, worst >= limit, detail)

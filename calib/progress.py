"""How far long work has come, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """stage: what is being done; done, total: in units of work, alike only within one job; remaining_seconds: at the
    rate so far, None before there is one."""

    stage: str
    done: float
    total: float
    remaining_seconds: float | None


Report = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Reports to nobody."""


class Work:
    """Counts work and reports it. What was done in an earlier run counts as done, but not for the rate."""

    def __init__(self, total: float, report: Report, done: float = 0.0):
        self._total, self._report, self._done, self._resumed = total, report, done, done
        self._start = time.monotonic()

    def advance(self, stage: str, amount: float) -> None:
        self._done += amount
        new, elapsed = self._done - self._resumed, time.monotonic() - self._start
        remaining = elapsed / new * max(self._total - self._done, 0.0) if new > 0 else None
        self._report(Progress(stage, self._done, self._total, remaining))

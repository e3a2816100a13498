"""What a training run prints and keeps while it goes on."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Protocol

from vl2.nano.losses import Outcome


class Run(Protocol):
    """What is told of a run: steps and pages so far, and its seconds."""

    step: int
    pages: int
    seconds: float


class Log:
    """Means over the steps since the last line; one JSON object a line in DIR/log.jsonl, short text on stderr."""

    def __init__(self, path: Path):
        self.path = path
        self._clear()

    def _clear(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)
        self.right: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def add(self, outcome: Outcome, crop: tuple[int, int]) -> None:
        for name, value in outcome.parts.items():
            self.values[name].append(value)
        for task, (right, asked) in outcome.exact.items():
            for key in (task, f"all {crop[0]}x{crop[1]}"):
                self.right[key][0] += right
                self.right[key][1] += asked

    def write(self, run: Run, pages_per_second: float) -> None:
        means = {name: round(sum(values) / len(values), 4) for name, values in self.values.items()}
        exact = {task: round(right / asked, 3) for task, (right, asked) in sorted(self.right.items())}
        line = {"step": run.step, "pages": run.pages, "minutes": round(run.seconds / 60, 1),
                "pages_per_second": round(pages_per_second, 1), **means, "exact": exact}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), file=sys.stderr, flush=True)
        self._clear()

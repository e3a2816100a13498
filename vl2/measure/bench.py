"""Rounds over one or two bundles: each round measures each of them once, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vl2.errors import VL2Error
from vl2.machine.rates import copy_bandwidth
from vl2.measure.figures import Reading, complete, medians, ratios
from vl2.measure.probe import request_of
from vl2.measure.traffic import COUNTING, Traffic, traffic_of
from vl2.measure.workload import Workload


@dataclass(frozen=True)
class Measured:
    """A bundle and its readings, one a round; figures: medians over them by key."""

    bundle: Path
    traffic: Traffic
    readings: tuple[Reading, ...]
    figures: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"bundle": str(self.bundle), "backend": self.readings[0]["backend"], "figures": self.figures,
                "read_bytes_by_module": self.traffic.weights, "cache_bytes_per_position": self.traffic.cache_position,
                "rounds": list(self.readings)}


@dataclass(frozen=True)
class Bench:
    """What was measured, of one bundle or of two in interleaved rounds."""

    workload: Workload
    rounds: int
    measured: tuple[Measured, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; ratios: of the second bundle's figures to the first's."""
        work = self.workload
        facts = {"rounds": self.rounds, "contexts": list(work.contexts), "new_tokens": work.new_tokens,
                 "read_bytes_are": COUNTING, "bundles": [one.to_dict() for one in self.measured]}
        if len(self.measured) == 2:
            first, second = self.measured
            facts["ratios"] = ratios(second.figures, first.figures)
        return facts


@dataclass(frozen=True)
class Setting:
    """options: keyword arguments of BundleOptions that JSON can hold. tell: gets a line before each measurement."""

    workload: Workload
    rounds: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    tell: Callable[[str], None] = lambda line: None


def run_bench(bundles: Sequence[Path], setting: Setting) -> Bench:
    """Measures the bundles in turn, so that a noisy machine meets all of them alike.

    Raises VL2Error for what is no bundle and for whatever a bundle raises while it is asked.
    """
    traffics = [traffic_of(bundle) for bundle in bundles]
    readings: list[list[Reading]] = [[] for _ in bundles]
    for turn in range(setting.rounds):
        for bundle, traffic, found in zip(bundles, traffics, readings, strict=True):
            setting.tell(f"round {turn + 1} of {setting.rounds}: {bundle}")
            found.append(_read(bundle, traffic, setting))
    contexts = setting.workload.contexts
    measured = tuple(Measured(bundle, traffic, tuple(found), medians(found, contexts))
                     for bundle, traffic, found in zip(bundles, traffics, readings, strict=True))
    return Bench(setting.workload, setting.rounds, measured)


def _read(bundle: Path, traffic: Traffic, setting: Setting) -> Reading:
    """The bandwidth right before, by as many threads, then one process of the probe."""
    bandwidth = copy_bandwidth(setting.options.get("threads"))
    command = [sys.executable, "-m", "vl2.measure.probe", request_of(bundle, setting.options, setting.workload)]
    # Without it (Python 3.11 and later) modules of the working directory would hide installed ones.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return complete(json.loads(lines[-1]), started, bandwidth, traffic)
    if done.returncode == 1 and lines:
        raise VL2Error(*json.loads(lines[-1]).values())
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise VL2Error(f"measuring {bundle} ended with code {done.returncode}: {last}",
                   "a negative code is a signal; -9 is mostly the system's, out of memory: see `vl2 plan`")

"""How many threads are worth starting: physical cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

from vl2 import cgroup

_CPUS = Path("/sys/devices/system/cpu")


def physical_cores() -> int:
    """Physical cores within this process's affinity and its container's CPU quota, at least 1."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in usable}
    return max(1, min(len(cores), _quota()))


def _siblings(cpu: int) -> str:
    """Names the core of a logical CPU by the list of its hardware threads, or by itself where the system is silent."""
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> float:
    quota = math.inf
    for folder in cgroup.folders():
        try:
            limit, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if limit != "max":
            quota = min(quota, math.ceil(int(limit) / int(period)))
    return quota

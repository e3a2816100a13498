"""Memory: what is available, what was used at most, and a refusal before a machine starts to swap."""

from __future__ import annotations

import math
from pathlib import Path

from vl2 import cgroup
from vl2.errors import VL2Error

_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")


def require_memory(needed_bytes: int, what: str) -> None:
    """Raises VL2Error when `needed_bytes` for `what` are more than the available memory."""
    available = available_bytes()
    if needed_bytes > available:
        raise VL2Error(
            f"{what} needs {needed_bytes / 1e9:.2f} GB of memory, {available / 1e9:.2f} GB are available",
            "end other programs, use a bundle of a smaller scheme or model, "
            "or open it with BundleOptions(check_memory=False) and expect it to be slow",
        )


def available_bytes() -> float:
    """Memory a program can still take without swapping: the system's, or the container's where that is less.

    Infinite where neither says (not Linux).
    """
    return min(_system_available(), _cgroup_available())


def _system_available() -> float:
    fields = _key_values(_MEMINFO, ":")
    return fields["MemAvailable"] * 1024 if "MemAvailable" in fields else math.inf


def _cgroup_available() -> float:
    """Limit less use, the least of all groups; file pages count as free because the kernel drops them when asked."""
    groups = [(folder, "memory.max", "memory.current", "file") for folder in cgroup.folders()]
    groups.append((cgroup.ROOT / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"))
    available = math.inf
    for folder, limit, used, cached in groups:
        try:
            most, taken = (int((folder / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):
            continue
        available = min(available, most - taken + _key_values(folder / "memory.stat", None).get(cached, 0))
    return available


def peak_rss_bytes() -> int:
    """The most resident memory this process has had (VmHWM)."""
    fields = _key_values(_STATUS, ":")
    if "VmHWM" in fields:
        return fields["VmHWM"] * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _key_values(path: Path, separator: str | None) -> dict[str, int]:
    """Lines such as `MemAvailable:   123 kB` or `file 123`, those whose value is a number."""
    fields = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return fields
    for line in lines:
        key, *rest = line.split(separator, 1)
        value = rest[0].split()[:1] if rest else []
        if value and value[0].isdigit():
            fields[key] = int(value[0])
    return fields

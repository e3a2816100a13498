"""The memory of a parity run, checked before it begins. Linux only."""

from __future__ import annotations

from pathlib import Path

from vl2.errors import VL2Error

_MEMORY = Path("/proc/meminfo")


def check_memory(needed_bytes: int) -> None:
    """Raises VL2Error when the system has less memory available than a parity run needs."""
    if not _MEMORY.exists():
        return
    line = next(line for line in _MEMORY.read_text().splitlines() if line.startswith("MemAvailable"))
    available_bytes = int(line.split()[1]) * 1024
    if available_bytes < needed_bytes:
        raise VL2Error(
            f"comparing the bundle with the PyTorch model needs {needed_bytes / 1e9:.1f} GB of memory, "
            f"{available_bytes / 1e9:.1f} GB are available",
            "end other programs, or give --no-verify: the export itself needs less than 1 GB",
        )

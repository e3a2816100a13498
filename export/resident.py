"""The memory of a parity run, checked before it begins."""

from __future__ import annotations

from vl2.errors import VL2Error
from vl2.memory import available_bytes


def check_memory(needed_bytes: int) -> None:
    """Raises VL2Error when the system, or the container, has less memory available than a parity run needs."""
    available = available_bytes()
    if available < needed_bytes:
        raise VL2Error(
            f"comparing the bundle with the PyTorch model needs {needed_bytes / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are available",
            "end other programs, or give --no-verify: the export itself needs less than 1 GB",
        )

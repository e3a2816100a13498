"""The memory of a parity run: checked before, and kept from piling up mapped weights meanwhile. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vl2.errors import VL2Error

_STATUS, _MAPS, _MEMORY = Path("/proc/self/status"), Path("/proc/self/maps"), Path("/proc/meminfo")
_INTERVAL_S = 0.05


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


@contextmanager
def bounded_file_pages(folder: Path, limit_bytes: int) -> Iterator[None]:
    """While active, drops the clean pages of files mapped from `folder` whenever they exceed the limit.

    They stay in the system's page cache and come back when touched, so only time is lost. Linux only: elsewhere the
    system reclaims such pages by itself when memory is short.
    """
    if not _MAPS.exists():
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(str(folder.resolve()), limit_bytes, done), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _watch(folder: str, limit_bytes: int, done: threading.Event) -> None:
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    while not done.wait(_INTERVAL_S):
        if _file_pages_bytes() > limit_bytes:
            for start, end in _mapped_ranges(folder):
                advise(start, end - start, mmap.MADV_DONTNEED)


def _file_pages_bytes() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def _mapped_ranges(folder: str) -> list[tuple[int, int]]:
    """Address ranges of the folder's files. onnxruntime maps weights privately and never writes to them."""
    ranges = []
    for line in _MAPS.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(folder):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            ranges.append((start, end))
    return ranges

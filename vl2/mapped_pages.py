"""Resident pages of mapped weights, given back to the system when they are no longer needed. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS, _MAPS = Path("/proc/self/status"), Path("/proc/self/maps")
_INTERVAL_S = 0.05


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


def drop_file_pages(folder: Path) -> None:
    """Drops the clean pages of files mapped from `folder` once; nothing where the system is not Linux."""
    if _MAPS.exists():
        _drop(str(folder.resolve()))


def _watch(folder: str, limit_bytes: int, done: threading.Event) -> None:
    while not done.wait(_INTERVAL_S):
        if _file_pages_bytes() > limit_bytes:
            _drop(folder)


def _drop(folder: str) -> None:
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in _mapped_ranges(folder):
        advise(start, end - start, mmap.MADV_DONTNEED)


def _file_pages_bytes() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def _mapped_ranges(folder: str) -> list[tuple[int, int]]:
    """Address ranges of files right in the folder, as a bundle's are.

    onnxruntime maps weights privately and never writes to them; libraries, which do, lie below or beside it.
    """
    ranges = []
    for line in _MAPS.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and os.path.dirname(fields[5]) == folder:
            start, end = (int(address, 16) for address in fields[0].split("-"))
            ranges.append((start, end))
    return ranges

"""sha256 of the checkpoint's files, computed beside the export: both then read the same pages from memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from vl2.file_hashes import sha256_of


@contextmanager
def hashed_in_background(files: list[Path]) -> Iterator[Future[dict[str, str]]]:
    """The hashes by file name, as a future; given up when the work inside ends without them."""
    stop = Event()

    def check(_block_bytes: int) -> None:
        if stop.is_set():
            raise CancelledError

    def hash_all() -> dict[str, str]:
        return {path.name: sha256_of(path, check) for path in files}

    with ThreadPoolExecutor(1) as worker:
        try:
            yield worker.submit(hash_all)
        finally:
            stop.set()

"""One process at a time in a work folder: a lock that leaves no file and dies with its process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vl2.errors import VL2Error


@contextmanager
def work_folder(folder: Path, what: str) -> Iterator[None]:
    """Makes `folder` where it is missing and holds it as `locked_folder`; one that stayed empty is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder, what):
        try:
            yield
        finally:
            with suppress(OSError):  # it holds unfinished work, or is gone
                folder.rmdir()


@contextmanager
def locked_folder(folder: Path, what: str) -> Iterator[None]:
    """Holds the existing `folder` for this process; it may be renamed or removed meanwhile.

    what: who else may hold it, such as "export". Raises VL2Error at once when another process does, and where the
    system has no such locks. The lock of a killed process is free: the system drops it.
    """
    try:
        import fcntl
    except ModuleNotFoundError as error:
        raise VL2Error(f"this {what} needs file locks of Linux or macOS", "on Windows, run it inside WSL") from error
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise VL2Error(f"another {what} writes to {folder}", "wait for it, or give another --out") from error
        if not folder.exists() or os.stat(folder).st_ino != os.fstat(handle).st_ino:
            raise VL2Error(f"another {what} has just finished in {folder}", "look at its result, or run again")
        yield
    finally:
        os.close(handle)

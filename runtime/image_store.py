"""Vectors of encoded images on disk, shared by processes and kept over restarts.

A file an image: `FORM`, rows and columns, a checksum of key and content, the content. Files are written beside and
renamed, so that a name never stands for a half one; what a lost power supply leaves is found by the checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import struct
import tempfile
import time
from pathlib import Path

import numpy as np

from vl2.errors import VL2Error

log = logging.getLogger("vl2.runtime")

FORM = b"vl2 image 1\n"
_HEAD = struct.Struct("<12s2Q32s")
_NAME = re.compile(r"[0-9a-f]{64}\.vectors")
_PART = ".part"
# Younger ones may be in the making by another process.
_STALE_PART_SECONDS = 600


class ImageStore:
    """Arrays by key in `folder`/images, at most `limit_bytes` of files, those used longest ago go first.

    Raises VL2Error when the folder cannot be made. A folder that cannot be written to is read only: a warning says so.
    """

    def __init__(self, folder: Path, limit_bytes: int):
        self._folder, self._limit_bytes, self._writable = folder / "images", limit_bytes, True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VL2Error(f"the cache folder {folder} cannot be made: {error}",
                           "give a folder that you may write to") from error
        with contextlib.suppress(OSError):
            self._drop_oldest()

    def get(self, key: bytes) -> np.ndarray | None:
        """float32 [tokens, H], read-only; None where it is not there. A damaged file is removed with a warning."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("the cached image %s cannot be read and is made anew: %s", path, error)
            return None
        vectors = _unpack(key, content)
        if vectors is None:
            log.warning("the cached image %s is damaged; it is removed and made anew", path)
            _remove(path)
            return None
        # The time of last use decides what goes first; a folder that is read only keeps its order.
        with contextlib.suppress(OSError):
            os.utime(path)
        return vectors

    def put(self, key: bytes, vectors: np.ndarray) -> None:
        """Keeps float32 [tokens, H]. What cannot be written is left out with a warning, and nothing more is tried."""
        head = _head(key, vectors)
        if not self._writable or len(head) + vectors.nbytes > self._limit_bytes:
            return
        try:
            self._write(self._path(key), head, vectors)
            self._drop_oldest()
        except OSError as error:
            self._writable = False
            log.warning("encoded images are not kept any more, %s cannot be written: %s", self._folder, error)

    def _write(self, path: Path, head: bytes, vectors: np.ndarray) -> None:
        handle, name = tempfile.mkstemp(suffix=_PART, prefix=path.stem, dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(head)
                stream.write(np.ascontiguousarray(vectors).data)
            os.replace(name, path)
        except BaseException:
            _remove(Path(name))
            raise

    def _drop_oldest(self) -> None:
        found, total = [], 0
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                status = entry.stat()
                if _NAME.fullmatch(entry.name):
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
                    total += status.st_size
                elif entry.name.endswith(_PART) and time.time() - status.st_mtime > _STALE_PART_SECONDS:
                    _remove(Path(entry.path))
        for _, size, path in sorted(found):
            if total <= self._limit_bytes:
                break
            _remove(Path(path))
            total -= size

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{key.hex()}.vectors"


def _head(key: bytes, vectors: np.ndarray) -> bytes:
    return _HEAD.pack(FORM, *vectors.shape, _checksum(key, vectors.shape, np.ascontiguousarray(vectors).data))


def _unpack(key: bytes, content: bytes) -> np.ndarray | None:
    """The array of a file; None unless it is whole and belongs to `key`."""
    if len(content) < _HEAD.size:
        return None
    form, rows, columns, checksum = _HEAD.unpack_from(content)
    body = memoryview(content)[_HEAD.size:]
    if form != FORM or len(body) != rows * columns * 4 or checksum != _checksum(key, (rows, columns), body):
        return None
    return np.frombuffer(body, "<f4").reshape(rows, columns)


def _checksum(key: bytes, shape: tuple[int, ...], body: memoryview) -> bytes:
    digest = hashlib.sha256(key + struct.pack("<2Q", *shape))
    digest.update(body)
    return digest.digest()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()

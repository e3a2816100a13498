"""sha256 of files, remembered for big ones: a bundle of gigabytes is hashed once per machine, not once per start."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

Progress = Callable[[str, int, int], None]

REMEMBERED_FROM_BYTES = 16 << 20
_MOST_ENTRIES = 1000
_BLOCK_BYTES = 1 << 20


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hexadecimal sha256 of a file; `progress` gets the size of each block read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


class HashCache:
    """Hashes of unchanged big files, by path, size, modification time and inode, in the user's cache folder.

    A cache that cannot be read or written is as good as an empty one: the files are hashed.
    """

    def __init__(self, path: Path | None = None):
        self._path = path or _default_path()
        self._hashes = _load(self._path)
        self._changed = False

    def sha256_of(self, path: Path, progress: Callable[[int], None] | None = None) -> str:
        """As `vl2.file_hashes.sha256_of`, from memory when the file has not changed."""
        status = path.stat()
        key = "|".join(map(str, (path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)))
        if key in self._hashes:
            if progress is not None:
                progress(status.st_size)
            return self._hashes[key]
        digest = sha256_of(path, progress)
        if status.st_size >= REMEMBERED_FROM_BYTES:
            self._hashes[key] = digest
            self._changed = True
        return digest

    def save(self) -> None:
        """Keeps what was hashed, newest last, whole or not at all."""
        if not self._changed:
            return
        merged = {**_load(self._path), **self._hashes}
        kept = dict(list(merged.items())[-_MOST_ENTRIES:])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
        except OSError:
            return
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(kept, stream)
            os.replace(name, self._path)
        except OSError:
            Path(name).unlink(missing_ok=True)


def _default_path() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "vl2" / "sha256.json"


def _load(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

"""Vectors of images that were encoded before, by what they were made from: in memory, and on disk if wanted."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from vl2.runtime.image_store import ImageStore


class ImageCache:
    """Arrays by key, at most `memory_bytes` in memory, where those used longest ago go first; `store` keeps more."""

    def __init__(self, memory_bytes: int, store: ImageStore | None = None):
        self._memory_bytes, self._store = memory_bytes, store
        self._held: OrderedDict[bytes, np.ndarray] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Memory of the arrays held."""
        return sum(vectors.nbytes for vectors in self._held.values())

    def get(self, key: bytes) -> np.ndarray | None:
        """float32 [tokens, H], read-only; None where it is not there."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        vectors = None if self._store is None else self._store.get(key)
        if vectors is not None:
            self._hold(key, vectors)
        return vectors

    def put(self, key: bytes, vectors: np.ndarray) -> None:
        """Keeps float32 [tokens, H], which the caller does not change any more."""
        self._hold(key, vectors)
        if self._store is not None:
            self._store.put(key, vectors)

    def _hold(self, key: bytes, vectors: np.ndarray) -> None:
        if vectors.nbytes > self._memory_bytes:
            return
        vectors.flags.writeable = False
        self._held[key] = vectors
        self._held.move_to_end(key)
        while self.size_bytes > self._memory_bytes:
            self._held.popitem(last=False)

"""Vectors of images that were encoded before, by what they were made from."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np


class ImageCache:
    """Arrays by key, in memory: at most `memory_bytes`, those used longest ago go first."""

    def __init__(self, memory_bytes: int):
        self._memory_bytes = memory_bytes
        self._held: OrderedDict[bytes, np.ndarray] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Memory of the arrays held."""
        return sum(vectors.nbytes for vectors in self._held.values())

    def get(self, key: bytes) -> np.ndarray | None:
        """float32 [tokens, H], read-only; None where it is not there."""
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key]

    def put(self, key: bytes, vectors: np.ndarray) -> None:
        """Keeps float32 [tokens, H], which the caller does not change any more."""
        if vectors.nbytes > self._memory_bytes:
            return
        vectors.flags.writeable = False
        self._held[key] = vectors
        self._held.move_to_end(key)
        while self.size_bytes > self._memory_bytes:
            self._held.popitem(last=False)

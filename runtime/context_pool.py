"""The caches of conversations that may be gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from vl2.runtime.engine import Context, Engine


class ContextPool:
    """Contexts that no answer is using, the one used last at the end; together at most `limit_bytes`."""

    def __init__(self, engine: Engine, limit_bytes: int):
        self._engine, self._limit_bytes = engine, limit_bytes
        self._idle: list[Context] = []

    @contextmanager
    def lent(self, contents: np.ndarray) -> Iterator[Context]:
        """A context for one answer to `contents` int64 [T], the one that has most of it; no other gets it then."""
        context = self._take(contents)
        try:
            yield context
        finally:
            self._idle.append(context)
            while self._idle and sum(idle.size_bytes for idle in self._idle) > self._limit_bytes:
                self._idle.pop(0)

    def _take(self, contents: np.ndarray) -> Context:
        if not self._idle:
            return Context(self._engine)
        best = max(self._idle, key=lambda context: context.common_length(contents))
        self._idle.remove(best)
        return best

"""The caches of conversations that may be gone on with: of a new question only what none of them has is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from vl2.runtime.engine import Context, Engine

# So many positions are sooner computed again than saved by copying all that comes before them: the prefill of one
# takes as long as copying some hundred.
_CHEAP_POSITIONS = 16
_ANSWER_ROOM = 64


class ContextPool:
    """Contexts that no answer is using, the one used longest ago first; all together at most `limit_bytes`, and less
    where the machine has less to give.

    A running answer is never stopped for the limit: what it takes on top is given back, the oldest first, when it ends.
    """

    def __init__(self, engine: Engine, limit_bytes: int):
        self._engine, self._limit_bytes = engine, limit_bytes
        self._idle: list[Context] = []
        self._busy: list[Context] = []

    @property
    def used_bytes(self) -> int:
        """Memory of all contexts, those in use too."""
        return sum(context.used_bytes for context in self._idle + self._busy)

    def has_room(self, positions: Sequence[int], more_bytes: int = 0) -> bool:
        """Whether there is memory for answers of so many positions each, those in use among them, once idle ones go,
        and for `more_bytes`."""
        wanted = self._engine.position_bytes * sum(positions) + more_bytes - self._busy_bytes()
        return wanted <= self._available_bytes() + sum(context.used_bytes for context in self._idle)

    @contextmanager
    def lent(self, contents: np.ndarray) -> Iterator[Context]:
        """A context for one answer to `contents` int64 [T], with what any has of it; it is nobody else's meanwhile."""
        context = self._take(contents)
        self._busy.append(context)
        try:
            yield context
        finally:
            self._busy.remove(context)
            self._idle.append(context)
            self._make_room(0)

    def _take(self, contents: np.ndarray) -> Context:
        new, room = Context(self._engine), len(contents) + _ANSWER_ROOM
        needed = new.bytes_for(room)
        best, common = self._longest(contents)
        if best is None:
            self._make_room(needed)
            return new
        if best in self._idle:
            # Continued where nothing dear is lost by it, and where there is no memory for both.
            both = best.used_bytes + self._busy_bytes() + needed
            affordable = both <= self._limit_bytes and needed <= self._available_bytes()
            if best.length - common <= _CHEAP_POSITIONS or (common > _CHEAP_POSITIONS and not affordable):
                self._idle.remove(best)
                self._make_room(max(needed, best.used_bytes))
                return best
            self._idle.remove(best)
            self._idle.append(best)
        self._make_room(needed)
        if common > _CHEAP_POSITIONS:
            new.copy_prefix(best, common, room)
        return new

    def _longest(self, contents: np.ndarray) -> tuple[Context | None, int]:
        """The context that has most of `contents`, and how much; of equals an idle one, and of those the last used."""
        best, most = None, 0
        for context in self._busy + self._idle:
            common = context.common_length(contents)
            if common and common >= most:
                best, most = context, common
        return best, most

    def _available_bytes(self) -> float:
        return self._engine.backend.cache_memory.available_bytes()

    def _busy_bytes(self) -> int:
        return sum(context.used_bytes for context in self._busy)

    def _make_room(self, needed: int) -> None:
        """Drops idle contexts, the oldest first, until `needed` more bytes keep the limit and are to be had."""
        while self._idle and (self.used_bytes + needed > self._limit_bytes or needed > self._available_bytes()):
            self._idle.pop(0)

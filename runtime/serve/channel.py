"""From the worker's thread to the answering task: text is merged while nobody takes it, and no client holds it up."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Taken(Generic[T]):
    """What came since the last time. end: the outcome, None while there is more to come."""

    text: str
    end: T | None


class Channel(Generic[T]):
    """One job's text and outcome. `put` and `finish` from any thread, `take` in the event loop it was made in."""

    def __init__(self, most_characters: int):
        self._most = most_characters
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._text: list[str] = []
        self._held = 0
        self._end: T | None = None

    def put(self, text: str) -> bool:
        """Adds a piece; False when more is held than allowed, because the client does not read."""
        with self._lock:
            self._text.append(text)
            self._held += len(text)
            full = self._held > self._most
        self._wake()
        return not full

    def finish(self, end: T) -> None:
        """Sets the outcome; the first one stays."""
        with self._lock:
            self._end = end if self._end is None else self._end
        self._wake()

    async def take(self) -> Taken[T]:
        """What has come, waiting until something has."""
        await self._ready.wait()
        with self._lock:
            self._ready.clear()
            taken = Taken("".join(self._text), self._end)
            self._text.clear()
            self._held = 0
        return taken

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:
            pass  # the loop has ended, and with it whoever waited

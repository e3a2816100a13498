"""Who is next: clients in turn, each client's own requests in their order."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class QueueFull(Exception):
    """There is no room; the message says whose bound was reached."""


class QueueClosed(Exception):
    """The queue lets nothing in any more."""


class FairQueue(Generic[T]):
    """A bounded queue that goes round the clients, so that none can starve the others. Thread-safe.

    limit: of all together; per_client: of one client's waiting entries.
    """

    def __init__(self, limit: int, per_client: int):
        self._limit, self._per_client = limit, per_client
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return self._length()

    def put(self, client: str, entry: T) -> None:
        """Adds an entry; a client that had none goes to the end of the round.

        Raises QueueFull and QueueClosed.
        """
        with self._changed:
            own = len(self._waiting.get(client, ()))
            if self._closed:
                raise QueueClosed
            if own >= self._per_client:
                raise QueueFull(f"{own} of your requests are waiting, at most {self._per_client} may")
            if self._length() >= self._limit:
                raise QueueFull(f"{self._length()} requests are waiting, at most {self._limit} may")
            self._waiting.setdefault(client, deque()).append(entry)
            self._changed.notify()

    def take(self, wait: bool = True) -> T | None:
        """The next entry; None once the queue is closed, and without `wait` where nothing is there."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or not wait)
            if self._closed or not self._waiting:
                return None
            client, entries = self._waiting.popitem(last=False)
            entry = entries.popleft()
            if entries:
                self._waiting[client] = entries
            return entry

    def remove(self, client: str, entry: T) -> bool:
        """Takes an entry out that is still waiting, and says whether it was."""
        with self._changed:
            entries = self._waiting.get(client)
            if entries is None or entry not in entries:
                return False
            entries.remove(entry)
            if not entries:
                del self._waiting[client]
            return True

    def close(self) -> list[T]:
        """Lets nothing in or out any more; returns what was waiting."""
        with self._changed:
            self._closed = True
            left = [entry for entries in self._waiting.values() for entry in entries]
            self._waiting.clear()
            self._changed.notify_all()
            return left

    def _length(self) -> int:
        return sum(map(len, self._waiting.values()))

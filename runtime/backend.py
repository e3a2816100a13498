"""The one shape that every backend has: it runs a bundle's graphs on NumPy arrays, and says where caches lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vl2 import memory

# NumPy arrays; a cache is a buffer of the backend's own `cache_memory`.
Arrays = Mapping[str, Any]


@dataclass(frozen=True)
class Limits:
    """The most that a backend takes: positions of a cache, tokens and tiles of one run. None is no limit; where tiles
    have none, few of them go at once."""

    context: int | None = None
    tokens: int | None = None
    tiles: int | None = None


class CacheMemory(Protocol):
    """Where the caches of conversations lie. Buffers have shape, dtype and nbytes; they are freed when nobody has them.

    lazy: the system gives memory to a buffer's pages when they are written, not before.
    """

    lazy: bool

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A buffer, not cleared."""
        ...

    def copy(self, target: Any, source: Any, positions: int) -> None:
        """Copies the first `positions` of a buffer [1, C, …] to another of equal sides but C."""
        ...

    def available_bytes(self) -> float:
        """What buffers can still take."""
        ...


class HostMemory:
    """Buffers are NumPy arrays."""

    lazy = True

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """As CacheMemory.allocate."""
        return np.empty(shape, dtype)

    def copy(self, target: np.ndarray, source: np.ndarray, positions: int) -> None:
        """As CacheMemory.copy."""
        target[:, :positions] = source[:, :positions]

    def available_bytes(self) -> float:
        """As CacheMemory.available_bytes."""
        return memory.available_bytes()


class Backend(Protocol):
    """Runs graphs by name, such as "vision" and "decoder". Who inherits has the host's memory and no limits."""

    limits: Limits = Limits()
    cache_memory: CacheMemory = HostMemory()

    @property
    def description(self) -> str:
        """Where the graphs run, in one line."""
        ...

    def load(self, graph: str) -> None:
        """Makes a graph ready to run; nothing when it is."""
        ...

    def run(self, graph: str, feeds: Arrays, results: Arrays) -> None:
        """Runs one graph on `feeds` and writes its outputs into the given `results`, all C-contiguous.

        A graph that is not loaded is loaded first; `results` never overlap `feeds`.
        """
        ...

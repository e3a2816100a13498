"""The cache of one sequence: a buffer a tensor, sequence-major, so that every prefix is contiguous and never copied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vl2.manifest import Graph
from vl2.runtime.backend import CacheMemory, HostMemory

_SMALLEST_CAPACITY = 64


def position_bytes(graph: Graph) -> int:
    """Memory of one position in the caches of a decoder graph, without making one."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in _entries(graph).values())


def _entries(graph: Graph) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of a position, by port `past`."""
    ports = {port.name: port for port in graph.inputs}
    return {pair.past: (tuple(ports[pair.past].shape[2:]), np.dtype(ports[pair.past].dtype)) for pair in graph.cache}


class KVCache:
    """Entries of `length` positions for every cache port of a decoder graph, batch size 1.

    buffers: by port `past`, [1, capacity, ...], in the backend's memory; the capacity doubles when it is reached, and
    goes beyond `limit` for no spare room. slab, slot: where it lies if it shares its buffers (`cache_slots`).
    """

    slab: Any = None
    slot: int = 0

    def __init__(self, graph: Graph, memory: CacheMemory | None = None, limit: int | None = None):
        self._pairs, self.in_place = graph.cache, graph.in_place
        self._memory, self._limit = memory or HostMemory(), limit
        self._entries = _entries(graph)
        self._buffers: dict[str, Any] = {name: self._memory.allocate((1, 0, *shape), dtype)
                                         for name, (shape, dtype) in self._entries.items()}
        self.position_bytes = position_bytes(graph)
        self.capacity = 0
        self.length = 0
        self._touched = 0

    @property
    def size_bytes(self) -> int:
        """Memory of the buffers."""
        return self.capacity * self.position_bytes

    @property
    def used_bytes(self) -> int:
        """What the buffers take: where memory is given to pages when they are written, what was ever written."""
        return self._touched * self.position_bytes if self._memory.lazy else self.size_bytes

    def reserve(self, length: int, spare: int = 0) -> None:
        """Makes room for `length` positions and, as far as the limit allows, `spare` more, at least doubling what there
        is."""
        wanted = self._within(length, length + spare)
        if wanted <= self.capacity:
            return
        capacity = self._within(length, max(wanted, 2 * self.capacity, _SMALLEST_CAPACITY))
        for name, (shape, dtype) in self._entries.items():
            grown = self._memory.allocate((1, capacity, *shape), dtype)
            self._memory.copy(grown, self._buffers[name], self.length)
            self._buffers[name] = grown
        self.capacity, self._touched = capacity, self.length

    def _within(self, least: int, wished: int) -> int:
        return wished if self._limit is None else max(least, min(wished, self._limit))

    def copy_prefix(self, other: KVCache, length: int) -> None:
        """Takes the first `length` positions of `other`, a cache of the same graph, in place of its own."""
        assert length <= other.length, "only what is there can be copied"
        self.length = 0
        self.reserve(length)
        for name, buffer in self._buffers.items():
            self._memory.copy(buffer, other._buffers[name], length)
        self.append(length)

    def past(self) -> Mapping[str, Any]:
        """Views [1, length, ...] of what is there, by input port; whole buffers where the graph writes into them."""
        if self.in_place:
            return self._buffers
        return {pair.past: self._buffers[pair.past][:, :self.length] for pair in self._pairs}

    def room(self, tokens: int) -> Mapping[str, np.ndarray]:
        """Views [1, tokens, ...] right behind, by output port, for the results before `append`; none in place."""
        end = self.length + tokens
        assert end <= self.capacity, "reserve() comes first"
        return {pair.new: self._buffers[pair.past][:, self.length:end] for pair in self._pairs if pair.new}

    def append(self, tokens: int) -> None:
        """Counts `tokens` positions that were written into `room`."""
        assert self.length + tokens <= self.capacity, "more positions than there is room for"
        self.length += tokens
        self._touched = max(self._touched, self.length)

    def truncate(self, length: int) -> None:
        """Forgets all positions from `length` on."""
        assert 0 <= length <= self.length, "a cache is cut, not extended"
        self.length = length

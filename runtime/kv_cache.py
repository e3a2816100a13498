"""The cache of one sequence: a buffer a tensor, sequence-major, so that every prefix is contiguous and never copied."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from vl2.manifest import Graph

_SMALLEST_CAPACITY = 64


class KVCache:
    """Entries of `length` positions for every cache port of a decoder graph, batch size 1.

    buffers: by port `past`, [1, capacity, ...]; the capacity doubles when it is reached.
    """

    def __init__(self, graph: Graph):
        ports = {port.name: port for port in graph.inputs}
        self._pairs, self.in_place = graph.cache, graph.in_place
        self._entries = {pair.past: (tuple(ports[pair.past].shape[2:]), np.dtype(ports[pair.past].dtype))
                         for pair in graph.cache}
        self._buffers = {name: np.empty((1, 0, *shape), dtype) for name, (shape, dtype) in self._entries.items()}
        self.position_bytes = sum(buffer.itemsize * math.prod(buffer.shape[2:]) for buffer in self._buffers.values())
        self.capacity = 0
        self.length = 0
        self._touched = 0

    @property
    def size_bytes(self) -> int:
        """Memory of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @property
    def used_bytes(self) -> int:
        """What of the buffers was ever written: the system gives memory to pages when they are."""
        return self._touched * self.position_bytes

    def reserve(self, length: int) -> None:
        """Makes room for `length` positions, at least doubling what there is."""
        if length <= self.capacity:
            return
        capacity = max(length, 2 * self.capacity, _SMALLEST_CAPACITY)
        for name, (shape, dtype) in self._entries.items():
            grown = np.empty((1, capacity, *shape), dtype)
            grown[:, :self.length] = self._buffers[name][:, :self.length]
            self._buffers[name] = grown
        self.capacity, self._touched = capacity, self.length

    def copy_prefix(self, other: KVCache, length: int) -> None:
        """Takes the first `length` positions of `other`, a cache of the same graph, in place of its own."""
        assert length <= other.length, "only what is there can be copied"
        self.length = 0
        self.reserve(length)
        for name, buffer in self._buffers.items():
            buffer[:, :length] = other._buffers[name][:, :length]
        self.append(length)

    def past(self) -> Mapping[str, np.ndarray]:
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

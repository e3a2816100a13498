"""Caches of many sequences as rows of one buffer a port, so that a decode step of several of them runs as one batch."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Mapping

import numpy as np

from vl2.errors import VL2Error
from vl2.manifest import Graph
from vl2.runtime.kv_cache import KVCache

# Linux's on every processor; `mmap` names it from Python 3.13 on.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_SLOTS = 32


class Slab:
    """Rows [slots, capacity, …] for every cache port of a decoder graph that has `cache_row`.

    Address space only: the system gives memory to pages when they are written and takes it back with the row.
    """

    def __init__(self, graph: Graph, slots: int, capacity: int):
        ports = {port.name: port for port in graph.inputs}
        self._maps: dict[str, mmap.mmap] = {}
        self.buffers: dict[str, np.ndarray] = {}
        for pair in graph.cache:
            dtype, entry = np.dtype(ports[pair.past].dtype), ports[pair.past].shape[2:]
            size = slots * capacity * math.prod(entry) * dtype.itemsize
            mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
            # A huge page would take two megabytes for the first position; a kernel without them refuses the advice.
            with contextlib.suppress(OSError, AttributeError):
                mapped.madvise(mmap.MADV_NOHUGEPAGE)
            self._maps[pair.past] = mapped
            self.buffers[pair.past] = np.frombuffer(mapped, dtype).reshape(slots, capacity, *entry)
        self.capacity = capacity
        self.free = list(range(slots))[::-1]

    def give_back(self, slot: int) -> None:
        """Frees a row and its memory; pages that it shares with its neighbours stay."""
        for name, mapped in self._maps.items():
            row = self.buffers[name][slot].nbytes
            start = -(-slot * row // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (slot + 1) * row // mmap.PAGESIZE * mmap.PAGESIZE - start
            if length > 0:
                mapped.madvise(mmap.MADV_DONTNEED, start, length)
        self.free.append(slot)


class CacheSlots:
    """As many slabs as there are sequences for; each row has room for all positions that the model knows."""

    def __init__(self, graph: Graph, positions: int):
        self.graph, self._positions, self._slots = graph, positions, _SLOTS
        self._slabs: list[Slab] = []

    def take(self) -> tuple[Slab, int]:
        """A row that is nobody's, in the first slab that has one."""
        slab = next((slab for slab in self._slabs if slab.free), None)
        if slab is None:
            slab = self._new_slab()
            self._slabs.append(slab)
        return slab, slab.free.pop()

    def _new_slab(self) -> Slab:
        """With fewer rows where the system refuses address space for many."""
        while True:
            try:
                return Slab(self.graph, self._slots, self._positions)
            except (OSError, ValueError, OverflowError, MemoryError) as error:
                if self._slots == 1:
                    raise VL2Error(f"the system gives no address space for a cache of {self._positions:,} positions: "
                                   f"{error}", "raise `ulimit -v`, or set vm.overcommit_memory to 0 or 1") from error
                self._slots //= 2


class SlotCache(KVCache):
    """The cache of one sequence in a row of a slab, given back when nobody has it any more; growing copies nothing."""

    def __init__(self, slots: CacheSlots):
        super().__init__(slots.graph)
        self.slab, self.slot = slots.take()
        weakref.finalize(self, self.slab.give_back, self.slot).atexit = False
        self._buffers = {name: whole[self.slot:self.slot + 1] for name, whole in self.slab.buffers.items()}
        self.capacity = self.slab.capacity

    def reserve(self, length: int, spare: int = 0) -> None:
        """There is room for all positions that the model knows."""
        if length > self.capacity:
            raise VL2Error(f"{length:,} positions were asked for, and the model holds {self.capacity:,}",
                           "shorten the conversation")

    def past(self) -> Mapping[str, np.ndarray]:
        """The whole buffers, all rows of them."""
        return self.slab.buffers

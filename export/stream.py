"""Streams weights from the checkpoint into one file: read, converted, hashed and written tensor by tensor.

Memory: one block of a tensor, in the dtype of the checkpoint and converted. Only rearranged tensors (the small
up-projections of latent attention) are read whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vl2.errors import VL2Error
from vl2.export.checkpoint import Checkpoint
from vl2.export.packed_storage import SCALES, PackedStorage
from vl2.export.passes.store_weights import PlacedWeight
from vl2.export.schemes import FLOAT16, FLOAT16_MAX
from vl2.export.weights import Weight
from vl2.manifest import FileFacts

_BLOCK_ELEMENTS = 4 << 20

Report = Callable[[int], None]


@dataclass
class WrittenWeights:
    """What was written: the file's facts and, by checkpoint tensor, how many numbers became 0 in float16."""

    facts: FileFacts
    underflow: dict[str, int] = field(default_factory=dict)


def write_weights(
    path: Path, header: bytes, placed: Iterable[PlacedWeight], checkpoint: Checkpoint, report: Report
) -> WrittenWeights:
    """Writes `header`, then the weights at their offsets (which count from the end of the header).

    report: gets the number of bytes of each block. Raises VL2Error on bad numbers and OSError on a full disk.
    """
    underflow: dict[str, int] = {}
    with _one_thread(), HashedFile(path) as file:
        file.write(header)
        for place in placed:
            file.pad_to(len(header) + place.offset)
            for block in converted_blocks(place, checkpoint, underflow):
                file.write(block)
                report(len(block))
    return WrittenWeights(file.facts, underflow)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Blocks this small lose more to waking threads than these save: 0.8 s against 1.8 s for 147 MB."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def converted_blocks(place: PlacedWeight, checkpoint: Checkpoint, underflow: dict[str, int]) -> Iterator[memoryview]:
    """The bytes of one weight as stored, in blocks; counts in `underflow` what float16 turns into 0."""
    if isinstance(place.storage, PackedStorage):
        yield from _packed_blocks(place, place.storage, checkpoint)
        return
    name = checkpoint.entry(place.weight).name
    for part in map(checkpoint.read, _blocks(place.weight)):
        stored = part.to(place.storage.torch_dtype).contiguous()
        if place.storage is FLOAT16 and part.dtype != torch.float16:
            _check_range(part, place, checkpoint)
            lost = int(torch.count_nonzero(part) - torch.count_nonzero(stored))
            if lost:
                underflow[name] = underflow.get(name, 0) + lost
        yield memoryview(stored.numpy()).cast("B")


def _packed_blocks(place: PlacedWeight, storage: PackedStorage, checkpoint: Checkpoint) -> Iterator[memoryview]:
    read = checkpoint.read_scales if storage.part == SCALES else checkpoint.read_codes
    for part in map(read, _blocks(place.weight)):
        yield memoryview(storage.encode(part).contiguous().numpy()).cast("B")


def _blocks(weight: Weight) -> list[Weight]:
    """The weight in blocks of an even number of rows, which make whole bytes of four-bit codes."""
    if any(step != "narrow" for step, _ in weight.layout):
        return [weight]
    rows = _BLOCK_ELEMENTS * weight.shape[0] // weight.elements
    return weight.row_blocks(max(2, rows // 2 * 2))


def _check_range(block: Tensor, place: PlacedWeight, checkpoint: Checkpoint) -> None:
    low, high = block.aminmax()  # four times as fast as abs().max(), and no copy
    largest = max(float(high), -float(low))
    if largest > FLOAT16_MAX:
        entry = checkpoint.entry(place.weight)
        raise VL2Error(
            f"tensor `{entry.name}` in {entry.path} holds {largest:g}, and float16 ends at {FLOAT16_MAX:g}",
            "export with --scheme fp32",
        )


class HashedFile:
    """A file written from front to back; its sha256 is computed in a thread beside the writing."""

    def __init__(self, path: Path):
        self._path = path
        self._digest = hashlib.sha256()
        self._size = 0
        self._pending: Future | None = None

    def __enter__(self) -> HashedFile:
        self._file = self._path.open("wb", buffering=0)
        self._worker = ThreadPoolExecutor(1)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._worker.shutdown()
        if kind is None:
            os.fsync(self._file.fileno())
        self._file.close()

    def write(self, block: bytes | memoryview) -> None:
        """Appends a block; it must not change before the next call."""
        if self._pending is not None:
            self._pending.result()
        self._pending = self._worker.submit(self._digest.update, block)
        view = memoryview(block)
        while len(view):
            view = view[self._file.write(view) :]
        self._size += len(block)

    def pad_to(self, offset: int) -> None:
        """Zeros up to an offset that was not written yet."""
        assert offset >= self._size, f"{self._path} is at {self._size}, past {offset}"
        self.write(bytes(offset - self._size))

    @property
    def facts(self) -> FileFacts:
        """Size and sha256, once the file is closed."""
        return FileFacts(self._size, self._digest.hexdigest())

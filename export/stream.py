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
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vl2.errors import VL2Error
from vl2.export.checkpoint import Checkpoint
from vl2.export.native_storage import NativeStorage
from vl2.export.packed_storage import SCALES, PackedStorage
from vl2.export.passes.store_weights import PlacedWeight
from vl2.export.schemes import FLOAT16, FLOAT16_MAX, Storage
from vl2.export.weights import Weight
from vl2.manifest import FileFacts
from vl2.plugins.native.layout import ROWS, interleave, pack

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
    if isinstance(place.storage, NativeStorage):
        yield from _native_blocks(place, place.storage, _Floats(checkpoint, underflow))
        return
    floats = _Floats(checkpoint, underflow)
    for part in _blocks(place.weight):
        yield memoryview(floats.read(part, place.storage).numpy()).cast("B")


@dataclass(frozen=True)
class _Floats:
    """Reads weights that are not packed; counts in `underflow` what float16 turns into 0, by tensor of the file."""

    checkpoint: Checkpoint
    underflow: dict[str, int]

    def read(self, weight: Weight, storage: Storage) -> Tensor:
        """As stored; raises VL2Error on a number beyond float16."""
        read = self.checkpoint.read(weight)
        stored = read.to(storage.torch_dtype).contiguous()
        if storage is FLOAT16 and read.dtype != torch.float16:
            _check_range(read, weight, self.checkpoint)
            lost = int(torch.count_nonzero(read) - torch.count_nonzero(stored))
            if lost:
                name = self.checkpoint.entry(weight).name
                self.underflow[name] = self.underflow.get(name, 0) + lost
        return stored


def _native_blocks(place: PlacedWeight, storage: NativeStorage, floats: _Floats) -> Iterator[memoryview]:
    """Rows of the operator library's layout, whole panels at a time."""
    whole = place.weight
    matrices = [whole.of_expert(e) for e in range(storage.copies)] if len(whole.shape) == 3 else [whole]
    for block in (block for matrix in matrices for block in _blocks(matrix, ROWS)):
        numbers, scales = _numbers(block, storage, floats)
        if storage.partner is not None:
            others = _numbers(replace(block, parameter=storage.partner), storage, floats)
            numbers, scales = interleave(numbers, others[0]), None if scales is None else interleave(scales, others[1])
        yield memoryview(pack(replace(storage.layout, rows=len(numbers)), numbers, scales))


def _numbers(weight: Weight, storage: NativeStorage, floats: _Floats) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes and scales of a matrix, or its floats."""
    if not storage.layout.quantized:
        return floats.read(weight, FLOAT16).numpy(), None
    scales = floats.checkpoint.read_scales(weight).to(getattr(torch, storage.layout.scale_dtype))
    return floats.checkpoint.read_codes(weight).numpy(), scales.numpy()


def _packed_blocks(place: PlacedWeight, storage: PackedStorage, checkpoint: Checkpoint) -> Iterator[memoryview]:
    read = checkpoint.read_scales if storage.part == SCALES else checkpoint.read_codes
    for part in map(read, _blocks(place.weight)):
        yield memoryview(storage.encode(part).contiguous().numpy()).cast("B")


def _blocks(weight: Weight, multiple: int = 2) -> list[Weight]:
    """The weight in blocks of a multiple of so many rows; an even number makes whole bytes of four-bit codes."""
    if any(step != "narrow" for step, _ in weight.layout):
        return [weight]
    rows = _BLOCK_ELEMENTS * weight.shape[0] // weight.elements
    return weight.row_blocks(max(multiple, rows // multiple * multiple))


def _check_range(block: Tensor, weight: Weight, checkpoint: Checkpoint) -> None:
    low, high = block.aminmax()  # four times as fast as abs().max(), and no copy
    largest = max(float(high), -float(low))
    if largest > FLOAT16_MAX:
        entry = checkpoint.entry(weight)
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

"""Safetensors files written as their tensors are computed, and read by rows: neither is ever whole in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vl2.safetensors_file import DTYPE_BYTES, TensorEntry

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What `write_tensors` needs to know of tensors that are there already."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write_tensors(
    path: Path, shapes: Shapes, pieces: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file beside `path` and renames it into place.

    pieces: data in the order of `shapes`; a tensor may come in several pieces, cut along its first axis.
    """
    header, position = {"__metadata__": dict(metadata or {})}, 0
    for name, (dtype, shape) in shapes.items():
        size = math.prod(shape) * DTYPE_BYTES[NAMES[dtype]]
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format's own writer aligns the data like this
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        written = 0
        for name, tensor in pieces:
            start, end = header[name]["data_offsets"]
            assert start <= written and written + tensor.nbytes <= end, f"`{name}` comes out of order or is too long"
            assert tensor.dtype == shapes[name][0], f"`{name}` is {tensor.dtype}, announced was {shapes[name][0]}"
            file.write(tensor.contiguous().numpy().data)
            written += tensor.nbytes
        assert written == position, f"{path}: {written} bytes were given, {position} announced"
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_slice(entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Rows start … stop − 1 of a tensor, in its dtype and memory of its own."""
    row = entry.size_bytes // entry.shape[0]
    data = bytearray((stop - start) * row)
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset + start * row)
        view, done = memoryview(data), 0
        while done < len(data) and (count := file.readinto(view[done:])):
            done += count
    assert done == len(data), f"{entry.path} was cut off while it was read"
    return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).view(stop - start, *entry.shape[1:])


def read_tensor(entry: TensorEntry) -> Tensor:
    """The whole tensor, as `read_slice`."""
    return read_slice(entry, 0, entry.shape[0])

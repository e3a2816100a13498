"""Matrices of a quantized checkpoint: packed words to codes, codes and scales to floats.

Code q of b bits is stored as u = q + 2^(b−1), the first at the low end of little-endian int32 words, row by row; a row
ends in zero bits up to a whole word. Ŵ = q · scale, with one scale for each group of neighbouring columns.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vl2.errors import VL2Error
from vl2.model.tensors import read_tensor
from vl2.quantization import PACKED, SCALE, SHAPE, Form
from vl2.safetensors_file import TensorEntry

assert sys.byteorder == "little", "packed words are viewed as bytes, which needs a little-endian machine"

Entries = Mapping[str, TensorEntry]
_INTEGERS = {"I32": torch.int32, "I64": torch.int64}


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """int32 words [N, W] to int8 codes [N, columns]."""
    unsigned = words.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack((unsigned & 0xF, unsigned >> 4), dim=-1).flatten(1)[:, :columns]
        return unsigned.contiguous().view(torch.int8) - 8
    return (unsigned[:, :columns] ^ 0x80).contiguous().view(torch.int8)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [N, K] from int8 codes [N, K] and scales [N, G]; exact for float16, as 8 + 11 bits fit into 24."""
    return (codes.unflatten(1, (scales.shape[1], -1)) * scales.float()[..., None]).flatten(1)


def read_codes(entries: Entries, module: str, form: Form, rows: tuple[int, int] | None = None) -> Tensor:
    """int8 codes [n, K] of a module, of `rows` (start, length) if given.

    Raises VL2Error on a cut-off file and where `weight_shape` contradicts the packed tensor.
    """
    packed = entries[module + PACKED]
    size, columns = read_integers(entries[module + SHAPE]).tolist()
    if packed.shape != (size, form.word_columns(columns)):
        raise VL2Error(f"`{module}{SHAPE}` in {packed.path} says {[size, columns]}, which {list(packed.shape)} words "
                       f"of {form.bits} bits do not hold")  # fmt: skip
    return unpack(read_integers(_rows(packed, rows)), form.bits, columns)


def read_scales(entries: Entries, module: str, rows: tuple[int, int] | None = None) -> Tensor:
    """Scales [n, G] in the file's dtype. Raises VL2Error on one that is not positive and finite."""
    scales = read_tensor(_rows(entries[module + SCALE], rows))
    if bool((scales <= 0).any()):
        raise VL2Error(f"`{module}{SCALE}` has a scale of {float(scales.min()):g}, expected more than 0")
    return scales


def read_dequantized(entries: Entries, module: str, form: Form, rows: tuple[int, int] | None = None) -> Tensor:
    """A module's weight, float32 [n, K]; raises VL2Error as the two above."""
    return dequantize(read_codes(entries, module, form, rows), read_scales(entries, module, rows))


def read_integers(entry: TensorEntry) -> Tensor:
    """An int32 or int64 tensor of the file."""
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        data = bytearray(file.read(entry.size_bytes))
    if len(data) != entry.size_bytes:
        raise VL2Error(f"`{entry.name}` in {entry.path} is cut off after {len(data)} of {entry.size_bytes} bytes")
    return torch.frombuffer(data, dtype=_INTEGERS[entry.dtype]).view(entry.shape)


def _rows(entry: TensorEntry, rows: tuple[int, int] | None) -> TensorEntry:
    return entry if rows is None else rows_of(entry, *rows)


def rows_of(entry: TensorEntry, start: int, length: int) -> TensorEntry:
    """Part of a tensor, as if it were one of its own in the file."""
    row_bytes = entry.size_bytes // entry.shape[0]
    return replace(
        entry, shape=(length, *entry.shape[1:]), offset=entry.offset + start * row_bytes, size_bytes=length * row_bytes
    )

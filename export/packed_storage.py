"""The parts that a quantized matrix is stored as in a bundle, and their bytes. Codes are kept, never rounded again.

MatMulNBits reads int4 only where its float32 kernel is fast; its int8 form expands the whole matrix in every call. An
INT8 code is therefore stored for it as two 4-bit planes: q = 16 · (high − 8) + low, high and low in 0 … 15.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from vl2.export.schemes import FLOAT16, FLOAT32, Storage
from vl2.quantization import Form

CODES, SCALES, NIBBLES, HIGH, LOW = "codes", "scales", "nibbles", "high", "low"
_BLOBS = (NIBBLES, HIGH, LOW)
# One part of each matrix, for counting parameters.
COUNTED = (CODES, NIBBLES, HIGH)
# What MatMulNBits takes on a CPU.
_BLOCKS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Packing:
    """How a matrix [N, K] was quantized and is cut: columns = K; block: MatMulNBits' block size, None elsewhere."""

    form: Form
    columns: int
    block: int | None = None

    @property
    def groups(self) -> int:
        """Scales a row, as quantized."""
        return self.form.scale_columns(self.columns)

    @property
    def group_size(self) -> int:
        """Columns a scale."""
        return self.columns // self.groups

    @property
    def blocks(self) -> int:
        """MatMulNBits' blocks a row."""
        return -(-self.columns // self.block)


def block_for(form: Form, columns: int) -> int | None:
    """The largest block that no scale ends inside of; None where MatMulNBits cannot hold the matrix."""
    group = columns if form.group_size is None else form.group_size
    divisor = next((block for block in _BLOCKS if group % block == 0), None)
    # one scale a row lets the last block be partial
    return _BLOCKS[-1] if divisor is None and group == columns else divisor


@dataclass(frozen=True)
class PackedStorage:
    """One part of a quantized matrix. scale_storage: the element type of its scales."""

    part: str
    packing: Packing
    scale_storage: Storage = FLOAT16

    @property
    def onnx_dtype(self) -> ir.DataType:
        """The element type in the graph."""
        if self.part == SCALES:
            return self.scale_storage.onnx_dtype
        if self.part in _BLOBS:
            return ir.DataType.UINT8
        return ir.DataType.INT4 if self.packing.form.bits == 4 else ir.DataType.INT8

    @property
    def safetensors_dtype(self) -> str:
        """The element type in a safetensors file, which has none of four bits."""
        return self.scale_storage.safetensors_dtype if self.part == SCALES else "I8"

    def shape_of(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """The part's shape for a weight of `shape` whose inputs (K) lie along `axis`."""
        packing = self.packing
        if self.part in _BLOBS:
            return (shape[0], packing.blocks, packing.block // 2)
        if self.part == SCALES:
            count = packing.groups if packing.block is None else packing.blocks
            return (*shape[:axis], count, *shape[axis + 1 :])
        return shape

    def size_bytes(self, shape: tuple[int, ...], axis: int) -> int:
        """Bytes of the part."""
        elements = 1
        for side in self.shape_of(shape, axis):
            elements *= side
        if self.part == SCALES:
            return elements * self.scale_storage.element_bytes
        return -(-elements // 2) if self.onnx_dtype == ir.DataType.INT4 else elements

    def encode(self, numbers: Tensor) -> Tensor:
        """The part's bytes as they lie in the file; numbers: scales of the matrix, or its int8 codes."""
        packing = self.packing
        if self.part == SCALES:
            repeats = 1 if packing.block is None else packing.blocks // packing.groups
            return numbers.repeat_interleave(repeats, dim=-1).to(self.scale_storage.torch_dtype).contiguous()
        if self.part == CODES:
            codes = numbers.contiguous()
            return codes if packing.form.bits == 8 else _pairs((codes.view(torch.uint8) & 0xF).flatten())
        zero = 1 << (packing.form.bits - 1)
        numbers = numbers.contiguous()
        unsigned = (numbers + zero).view(torch.uint8) if packing.form.bits == 4 else numbers.view(torch.uint8) ^ zero
        padding = packing.blocks * packing.block - packing.columns
        unsigned = F.pad(unsigned, (0, padding), value=zero) if padding else unsigned
        return _pairs({NIBBLES: unsigned, HIGH: unsigned >> 4, LOW: unsigned & 0xF}[self.part])


def _pairs(nibbles: Tensor) -> Tensor:
    """uint8 numbers below 16, two a byte along the last side, the first at the low end; an odd one gets a 0."""
    nibbles = F.pad(nibbles, (0, 1)) if nibbles.shape[-1] % 2 else nibbles
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def codes_and_scales(packing: Packing, scale_storage: Storage) -> list[PackedStorage]:
    """As DequantizeLinear reads them: signed codes of the weight's shape, and its scales."""
    return [PackedStorage(CODES, packing, scale_storage), PackedStorage(SCALES, packing, scale_storage)]


def blobs_and_scales(packing: Packing, scale_storage: Storage) -> list[PackedStorage]:
    """As MatMulNBits reads them."""
    parts = (NIBBLES,) if packing.form.bits == 4 else (HIGH, LOW)
    return [PackedStorage(part, packing, scale_storage) for part in (*parts, SCALES)]


def scale_storage_of(dtype: str) -> Storage:
    """Scales keep their value: float16 as it is, bfloat16 and float32 as float32."""
    return FLOAT16 if dtype == "F16" else FLOAT32

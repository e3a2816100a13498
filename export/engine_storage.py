"""How quantized matrices are stored for engines. Kernels read rows as quantized checkpoints have them:

INT4 [.., N, K] → bytes [.., N, K/2]: byte j of a row holds code 2j + 8 at its low end and code 2j + 1 + 8 above it, so
that a little-endian int32 holds 8 codes, the lowest nibble first. INT8: the codes. Scales: float16 [.., N, K / group].
For TensorRT's own products, those of the tower: INT8 codes [K, N] and a float16 scale a column [N].
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor

from vl2.errors import VL2Error
from vl2.export.packed_storage import CODES, SCALES, PackedStorage, Packing
from vl2.export.schemes import FLOAT16, Storage
from vl2.quantization import Form

# What the kernels of plugins/cuda read: rows of whole loads, and groups that begin with one.
_ROW_MULTIPLE = {4: 8, 8: 16}
_SMALLEST_GROUP = 16
# What the parts of a matrix X are called as inputs of a graph: X.weight_packed, X.weight_scale.
PART_NAMES = {CODES: "weight_packed", SCALES: "weight_scale"}


@dataclass(frozen=True)
class RowStorage(PackedStorage):
    """Codes or scales of a matrix [N, K] or of a stack [E, N, K], in rows."""

    @property
    def onnx_dtype(self) -> ir.DataType:
        """INT8 stands for bytes: TensorRT has no plugins with uint8 inputs."""
        return ir.DataType.FLOAT16 if self.part == SCALES else ir.DataType.INT8

    @property
    def safetensors_dtype(self) -> str:
        """As `PackedStorage.safetensors_dtype`."""
        return "F16" if self.part == SCALES else "I8"

    def shape_of(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """As stored."""
        last = self.packing.groups if self.part == SCALES else shape[-1] * self.packing.form.bits // 8
        return (*shape[:-1], last)

    def size_bytes(self, shape: tuple[int, ...], axis: int) -> int:
        """As `PackedStorage.size_bytes`."""
        elements = 1
        for side in self.shape_of(shape, axis):
            elements *= side
        return elements * (2 if self.part == SCALES else 1)

    def encode(self, numbers: Tensor) -> Tensor:
        """numbers: scales, or int8 codes [.., N, K]."""
        if self.part == SCALES or self.packing.form.bits == 8:
            return numbers.to(FLOAT16.torch_dtype) if self.part == SCALES else numbers
        unsigned = (numbers + 8).byte()
        return unsigned[..., 0::2] | unsigned[..., 1::2] << 4


@dataclass(frozen=True)
class ColumnStorage(PackedStorage):
    """INT8 codes of a matrix [N, K] as [K, N], or the scales of its columns [N]: what DequantizeLinear of opset 20 and
    TensorRT read beside a MatMul, a scale a column."""

    def shape_of(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """As `PackedStorage.shape_of`, without the side of one number that scales have there."""
        return (*shape[:axis], *shape[axis + 1:]) if self.part == SCALES else shape


def column_storage(shape: tuple[int, ...], form: Form) -> list[ColumnStorage]:
    """Codes and float16 scales of a matrix with one scale a row."""
    packing = Packing(form, shape[-1])
    assert form.bits == 8 and packing.groups == 1, f"{form.describe()} has no scale a column"
    return [ColumnStorage(CODES, packing, FLOAT16), ColumnStorage(SCALES, packing, FLOAT16)]


def row_storage(parameter: str, shape: tuple[int, ...], form: Form, scale: Storage) -> list[RowStorage]:
    """Codes and scales of a quantized parameter. Raises VL2Error where the kernels cannot read it so."""
    if scale != FLOAT16:
        raise VL2Error(f"`{parameter}` has scales of more than 16 bits, and engines read float16",
                       "quantize the original checkpoint with `vl2 quantize`, or use another lowering")  # fmt: skip
    packing = Packing(form, shape[-1])
    multiple, group = _ROW_MULTIPLE[form.bits], packing.group_size
    grouped = group == shape[-1] or group >= _SMALLEST_GROUP and group & (group - 1) == 0
    if shape[-1] % multiple or not grouped:
        raise VL2Error(
            f"`{parameter}` has rows of {shape[-1]:,} codes of {form.bits} bits in groups of {group}; the kernels of "
            f"engines read rows of a multiple of {multiple}, in groups of a power of two from {_SMALLEST_GROUP} on or "
            "one a row",
            "quantize with another group size, keep it float16 (`ignore` in the recipe), or use another lowering",
        )
    return [RowStorage(CODES, packing, scale), RowStorage(SCALES, packing, scale)]



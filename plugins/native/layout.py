"""The weight layout of the operator library: written here, read by `weights.h`. NumPy only, no torch.

A matrix [N, K] is cut into panels of 16 rows. A panel is its scales, then its codes; each part ends at a multiple of 64
bytes, so that every panel begins at one. K is filled to a multiple of 32 and N to one of 16 with zeros.

    panel p:  scales  [G, 16]         rows 16 p … 16 p + 15 side by side, one row of 16 a group of columns
              codes   [K / c, 16, c]  c columns a row side by side: 8 for int4, 4 for int8, 1 for fp16 and bf16
    int4: a row's 8 columns are 4 bytes; byte i holds q + 8 of column i in its low half, of column 4 + i in its high one
    int8: 4 bytes, q in two's complement

So 16 rows by 4 bytes are a vector of 512 bits with a row a lane, in which the codes of 4 or 8 consecutive columns
follow each other: what multiply-add instructions of 8-bit numbers take (VNNI, dotprod), and what a shift and a table
look-up turn into floats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vl2.errors import VL2Error

ROWS, COLUMNS, ALIGNMENT = 16, 32, 64
_BITS = {"int4": 4, "int8": 8, "fp16": 16, "bf16": 16}
_SCALE_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class Layout:
    """How a matrix [N, K] lies. group_size: columns a scale as stored, 0: one scale a row."""

    rows: int
    columns: int
    scheme: str
    group_size: int = 0
    scale_dtype: str = "float16"

    @property
    def quantized(self) -> bool:
        """Whether codes have scales."""
        return _BITS[self.scheme] < 16

    @property
    def panels(self) -> int:
        """Panels of 16 rows."""
        return -(-self.rows // ROWS)

    @property
    def padded_columns(self) -> int:
        """K filled to a multiple of 32."""
        return -(-self.columns // COLUMNS) * COLUMNS

    @property
    def groups(self) -> int:
        """Scales a row; 0 where there are none."""
        if not self.quantized:
            return 0
        return self.columns // self.group_size if self.group_size else 1

    @property
    def scale_bytes(self) -> int:
        """Bytes of a panel's scales."""
        return -(-self.groups * ROWS * _SCALE_BYTES[self.scale_dtype] // ALIGNMENT) * ALIGNMENT

    @property
    def panel_bytes(self) -> int:
        """Bytes of a panel."""
        return self.scale_bytes + self.padded_columns * ROWS * _BITS[self.scheme] // 8

    @property
    def size_bytes(self) -> int:
        """Bytes of the matrix, a multiple of 64."""
        return self.panels * self.panel_bytes


def layout_for(shape: tuple[int, int], scheme: str, groups: int = 1, scale_dtype: str = "float16") -> Layout:
    """The layout of a matrix [N, K]; groups: scales a row as quantized (ignored for floats).

    Groups that are no multiple of 32 columns are stored as several of 16 or 8 columns with the same scale. Raises
    VL2Error on a scheme that is not known and on groups that 8 does not divide.
    """
    rows, columns = shape
    if scheme not in _BITS or scale_dtype not in _SCALE_BYTES:
        raise VL2Error(f"the operator library has no scheme {scheme!r} with scales in {scale_dtype}",
                       f"schemes: {', '.join(_BITS)}; scales: {', '.join(_SCALE_BYTES)}")
    if _BITS[scheme] == 16 or groups == 1:
        return Layout(rows, columns, scheme, 0, scale_dtype)
    size, rest = divmod(columns, groups)
    stored = size if size % COLUMNS == 0 else int(np.gcd(size, COLUMNS))
    if rest or stored < 8:
        raise VL2Error(f"the operator library cannot hold {columns} inputs with {groups} scales a row",
                       "it wants groups of a multiple of 8 columns, or one scale a row")
    return Layout(rows, columns, scheme, stored, scale_dtype)


def pack(layout: Layout, numbers: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    """The bytes of a matrix, uint8 [layout.size_bytes].

    numbers: int8 codes [N, K], or float16 [N, K] for fp16, or bfloat16 as uint16 [N, K] for bf16. scales: [N, G] in
    the layout's scale_dtype, G as quantized; they and the codes keep their value.
    """
    padding = ((0, layout.panels * ROWS - layout.rows), (0, layout.padded_columns - layout.columns))
    numbers = np.pad(numbers, padding)
    packed = np.zeros((layout.panels, layout.panel_bytes), np.uint8)
    packed[:, layout.scale_bytes:] = _codes(layout, numbers)
    if layout.quantized:
        repeats = layout.groups // scales.shape[1]
        spread = np.pad(np.repeat(scales.astype(layout.scale_dtype, copy=False), repeats, axis=1), (padding[0], (0, 0)))
        by_panel = np.ascontiguousarray(spread.reshape(layout.panels, ROWS, layout.groups).transpose(0, 2, 1))
        packed[:, : by_panel[0].nbytes] = by_panel.reshape(layout.panels, -1).view(np.uint8)
    return packed.reshape(-1)


def _codes(layout: Layout, numbers: np.ndarray) -> np.ndarray:
    """uint8 [panels, bytes of a panel's codes]."""
    step = {"int4": 8, "int8": 4}.get(layout.scheme, 1)
    tiles = numbers.reshape(layout.panels, ROWS, layout.padded_columns // step, step).transpose(0, 2, 1, 3)
    if layout.scheme == "int4":
        unsigned = (tiles + 8).astype(np.uint8)
        tiles = unsigned[..., :4] | unsigned[..., 4:] << 4
    return np.ascontiguousarray(tiles).reshape(layout.panels, -1).view(np.uint8)


def unpack(layout: Layout, packed: np.ndarray) -> np.ndarray:
    """float32 [N, K] from the bytes of a matrix: code · scale, as `vl2.model.packed.dequantize`."""
    panels = packed.reshape(layout.panels, layout.panel_bytes)
    codes = np.ascontiguousarray(panels[:, layout.scale_bytes:])
    if layout.scheme == "int4":
        nibbles = codes.reshape(layout.panels, -1, ROWS, 4)
        tiles = np.concatenate((nibbles & 0xF, nibbles >> 4), axis=-1).astype(np.int8) - 8
    elif layout.scheme == "int8":
        tiles = codes.view(np.int8).reshape(layout.panels, -1, ROWS, 4)
    else:
        tiles = codes.view(np.float16 if layout.scheme == "fp16" else np.uint16).reshape(layout.panels, -1, ROWS, 1)
    numbers = tiles.transpose(0, 2, 1, 3).reshape(layout.panels * ROWS, layout.padded_columns)
    numbers = numbers[: layout.rows, : layout.columns]
    if layout.scheme == "bf16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    if not layout.quantized:
        return numbers.astype(np.float32)
    stored = np.ascontiguousarray(panels[:, : layout.groups * ROWS * _SCALE_BYTES[layout.scale_dtype]])
    scales = stored.view(layout.scale_dtype).reshape(layout.panels, layout.groups, ROWS).transpose(0, 2, 1)
    scales = scales.reshape(layout.panels * ROWS, layout.groups)[: layout.rows].astype(np.float32)
    return numbers * np.repeat(scales, layout.columns // layout.groups, axis=1)


def interleave(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Rows of gate and up [I, …] by turns of 16, each filled with zeros to a multiple of 16: [2 · ⌈I / 16⌉ · 16, …].

    A task of the operator then computes 16 gates and the ups that they meet. Scales are interleaved the same way.
    """
    rows = -(-gate.shape[0] // ROWS) * ROWS
    filled = [np.pad(part, ((0, rows - part.shape[0]), (0, 0))).reshape(-1, ROWS, part.shape[1]) for part in (gate, up)]
    return np.stack(filled, axis=1).reshape(2 * rows, gate.shape[1])

"""How a weight lies in memory for the kernels, and what they can read of it."""

from __future__ import annotations

from dataclasses import dataclass

from vl2.plugins.cuda.launch import require

BITS = {"int4": 4, "int8": 8, "fp16": 16}
_WHOLE_ROW = 31
_SMALLEST_GROUP = 16


@dataclass(frozen=True)
class Storage:
    """scheme: `int4` (uint8 [N, K / 2], code + 8, the first in the low half), `int8` (int8 [N, K]) or `fp16`.

    group_size: columns that share a float16 scale [N, K / group_size]; K for one scale a row; unused for fp16.
    """

    scheme: str = "fp16"
    group_size: int = 0

    def __post_init__(self) -> None:
        require(self.scheme in BITS, f"weights of scheme `{self.scheme}`", f"one of {', '.join(BITS)}")

    @property
    def bits(self) -> int:
        """Of one code."""
        return BITS[self.scheme]

    def shift(self, columns: int) -> int:
        """log2 of the group size for a matrix of K = `columns`, 31 for one scale a row. Raises VL2Error otherwise."""
        unit = 16 if self.scheme == "int8" else 8
        whole = columns > 0 and columns % unit == 0
        require(whole, f"{self.scheme} rows of {columns} columns", f"a multiple of {unit}")
        size = self.group_size
        if self.scheme == "fp16" or size == columns:
            return _WHOLE_ROW
        fits = size >= _SMALLEST_GROUP and size & (size - 1) == 0 and columns % size == 0
        require(fits, f"groups of {size} in rows of {columns}", f"a power of two from {_SMALLEST_GROUP}, or the row")
        return size.bit_length() - 1

    def names(self, weight: str) -> tuple[str, str | None]:
        """The buffers of a weight: codes and scales."""
        return weight, None if self.scheme == "fp16" else f"{weight}_scale"

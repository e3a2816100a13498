"""How a matrix is stored: bits and group size. Always symmetric with positive float16 scales.

That is the one form that compressed-tensors, Marlin, ONNX Runtime and TensorRT all accept.
"""

from __future__ import annotations

from dataclasses import dataclass

from vl2.errors import VL2Error

# Below 16 no consumer has a kernel: ONNX Runtime's MatMulNBits starts at 16, Marlin at 32.
SMALLEST_GROUP = 16


@dataclass(frozen=True)
class Scheme:
    """`bits` a weight; `group_size` neighbouring inputs share a scale, None for one scale a row ("channel")."""

    name: str
    bits: int
    group_size: int | None

    def group_for(self, inputs: int) -> int:
        """The group size for a matrix of K = `inputs`: the scheme's if it divides K, else by the fallback rule.

        The rule halves the group until it divides K (6848 at 128 takes 64, 4304 takes 16). Where not even 16 does,
        INT8 takes one scale a row and INT4 raises VL2Error.
        """
        size = self.group_size or inputs
        while inputs % size and size > SMALLEST_GROUP:
            size //= 2
        if inputs % size == 0:
            return size
        if self.bits == 8:
            return inputs
        raise VL2Error(
            f"a matrix has {inputs} inputs, which no group from {self.group_size} down to {SMALLEST_GROUP} divides",
            "give it the scheme `int8` or `keep` in the recipe",
        )

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code: [−8, 7] or [−128, 127]."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", 8, 128),
        Scheme("int8-channel", 8, None),
        Scheme("int4", 4, 32),
        Scheme("int4-g64", 4, 64),
        Scheme("int4-g128", 4, 128),
    )
}


def scheme_named(name: str) -> Scheme:
    """Raises VL2Error listing the schemes when there is none of this name."""
    if name not in SCHEMES:
        raise VL2Error(f"there is no scheme `{name}`, expected one of {', '.join(SCHEMES)}")
    return SCHEMES[name]

"""Launch plans: which kernels a problem needs, with grids, shared memory, arguments and workspace. Pure functions.

The emulation and both TensorRT hosts run exactly these plans; C++ has a text of its own of them (launch.h). An argument
is the name of a buffer (a pointer), None (a null pointer), an int (int32) or a float (float32).
"""

from __future__ import annotations

from dataclasses import dataclass

from vl2.errors import VL2Error

_ALIGNMENT = 256


@dataclass(frozen=True)
class Launch:
    """One kernel call. grid, block: x, y, z; shared_bytes: dynamic; more than 48 KB needs opting in."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[str | int | float | None, ...]


@dataclass(frozen=True)
class Plan:
    """launches in order on one stream; workspace: bytes of each scratch buffer by name."""

    launches: tuple[Launch, ...]
    workspace: dict[str, int]


def workspace_offsets(plan: Plan) -> dict[str, int]:
    """Where each scratch buffer begins in one allocation of `workspace_bytes`, 256-byte aligned."""
    offsets, end = {}, 0
    for name, size in plan.workspace.items():
        offsets[name] = end
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets


def workspace_bytes(plan: Plan) -> int:
    """Bytes of the scratch buffers together; no buffer needs to be cleared."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in plan.workspace.values())


def tiles(size: int, tile: int) -> int:
    """How many tiles cover `size`."""
    return -(-size // tile)


def require(condition: bool, what: str, expected: str) -> None:
    """Raises VL2Error where a kernel cannot do what is asked."""
    if not condition:
        raise VL2Error(f"the CUDA kernels do not cover {what}", f"expected {expected}; use the `portable` lowering")

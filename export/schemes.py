"""How weights are stored. Activations are float32 in every scheme of this table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir
import torch

from vl2.errors import VL2Error

FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Storage:
    """One element type under its names: torch, ONNX, safetensors."""

    torch_dtype: torch.dtype
    onnx_dtype: ir.DataType
    safetensors_dtype: str
    element_bytes: int

    def shape_of(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """The shape as stored: the weight's. (axis: where its inputs lie, as for packed parts.)"""
        return shape

    def size_bytes(self, shape: tuple[int, ...], axis: int) -> int:
        """Bytes of a weight of this shape."""
        return math.prod(shape) * self.element_bytes


FLOAT32 = Storage(torch.float32, ir.DataType.FLOAT, "F32", 4)
FLOAT16 = Storage(torch.float16, ir.DataType.FLOAT16, "F16", 2)

# Scheme to the storage of its matrices.
SCHEMES: dict[str, Storage] = {"fp32": FLOAT32, "fp16": FLOAT16}

ROUTER = ".mlp.gate.weight"


def storage_of(parameter: str, shape: tuple[int, ...], scheme: str) -> Storage:
    """Matrices as the scheme says; vectors and the router stay float32: they cost nothing and steer everything.

    parameter: the model's name; shape: of the whole parameter.
    """
    if len(shape) == 1 or parameter.endswith(ROUTER):
        return FLOAT32
    return SCHEMES[scheme]


def check_scheme(scheme: str) -> None:
    """Raises VL2Error on a scheme that does not exist."""
    if scheme not in SCHEMES:
        raise VL2Error(f"there is no scheme `{scheme}`", f"choose one of {', '.join(SCHEMES)}")

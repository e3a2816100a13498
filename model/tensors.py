"""Floating-point tensors of safetensors files, read one at a time into memory of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from vl2.errors import VL2Error
from vl2.safetensors_file import TensorEntry

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_tensor(entry: TensorEntry) -> Tensor:
    """One tensor in the dtype of the file, read into memory of its own.

    A plain read, not a memory map: pages of a map count as resident until the file is closed. Raises VL2Error naming
    tensor and file on a short read and on a NaN or infinity.
    """
    data = bytearray(entry.size_bytes)
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        view, done = memoryview(data), 0
        while done < len(data) and (count := file.readinto(view[done:])):
            done += count
    if done != len(data):
        raise VL2Error(f"tensor `{entry.name}` in {entry.path} is cut off after {done} of {len(data)} bytes")
    tensor = torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)
    if not all_finite(tensor):
        raise VL2Error(
            f"tensor `{entry.name}` in {entry.path} holds NaN or infinity",
            "the file is damaged, or its training diverged: fetch it again",
        )
    return tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, without a mask as large as the tensor (aminmax passes NaN on)."""
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())

"""Codes as the words of compressed-tensors `pack-quantized`.

Code q is stored as the unsigned u = q + 2^(b−1), the first at the low end of a little-endian int32:

    4 bits:  bits 31..28 u7 | 27..24 u6 | … | 7..4 u1 | 3..0 u0        word j holds columns 8j … 8j+7
    8 bits:  bits 31..24 u3 | 23..16 u2 | 15..8 u1 | 7..0 u0           word j holds columns 4j … 4j+3

A row ends in zero bits up to a whole word. Seen as bytes these are the blobs of ONNX Runtime's MatMulNBits.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from vl2.model.packed import unpack

__all__ = ["pack", "packed_columns", "unpack"]

assert sys.byteorder == "little", "packing views words as bytes and needs a little-endian machine"


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [N, K] of 4 or 8 bits to int32 words [N, ⌈K · bits / 32⌉]."""
    columns = codes.shape[1]
    unsigned = (codes + 8).view(torch.uint8) if bits == 4 else codes.view(torch.uint8) ^ 0x80
    unsigned = F.pad(unsigned, (0, -columns % (32 // bits)))
    if bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    return unsigned.contiguous().view(torch.int32)


def packed_columns(columns: int, bits: int) -> int:
    """Words in a row of `columns` codes."""
    return -(-columns * bits // 32)

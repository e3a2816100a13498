from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vl2.quant.packing import pack, packed_columns, unpack

matrices = st.tuples(st.integers(1, 7), st.integers(1, 70), st.sampled_from((4, 8)), st.integers(0, 1000))


def random_codes(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)


@given(matrices)
@settings(max_examples=80, deadline=None)
def test_unpacking_gives_back_what_was_packed(matrix) -> None:
    rows, columns, bits, seed = matrix
    codes = random_codes(*matrix)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, packed_columns(columns, bits))
    assert torch.equal(unpack(words, bits, columns), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_offset_codes_from_the_low_end(bits: int) -> None:
    codes = torch.arange(-4, 4, dtype=torch.int8)[None]
    words = pack(codes, bits)[0].long() & 0xFFFFFFFF
    per_word = 32 // bits
    for column, code in enumerate(codes[0].tolist()):
        word, place = divmod(column, per_word)
        assert (words[word] >> (place * bits)) % (1 << bits) == code + (1 << (bits - 1))


def test_the_bytes_are_those_of_matmulnbits() -> None:
    """Low nibble first, zero point 8: B of com.microsoft.MatMulNBits."""
    codes = random_codes(3, 32, 4, 0)
    unsigned = (codes + 8).to(torch.uint8)
    assert torch.equal(pack(codes, 4).view(torch.uint8), unsigned[:, 0::2] | unsigned[:, 1::2] << 4)


@given(matrices)
@settings(max_examples=40, deadline=None)
def test_words_equal_those_of_the_compressed_tensors_package(matrix) -> None:
    oracle = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    codes = random_codes(*matrix)
    assert torch.equal(pack(codes, matrix[2]), oracle.pack_to_int32(codes, matrix[2]))

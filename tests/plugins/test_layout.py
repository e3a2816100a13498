"""The weight layout of the operator library against `vl2.model.packed`: the same numbers, bit for bit."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vl2.errors import VL2Error
from vl2.model.packed import dequantize
from vl2.plugins.native.layout import interleave, layout_for, pack, unpack


@given(st.integers(1, 40), st.sampled_from([8, 16, 24, 32, 40, 64, 128]), st.integers(1, 4), st.sampled_from([4, 8]),
       st.sampled_from(["float16", "float32"]))
def test_codes_and_scales_dequantize_to_the_same_bits(rows, group_size, groups, bits, dtype):
    rng = np.random.default_rng(rows * group_size + groups)
    codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (rows, group_size * groups)).astype(np.int8)
    scales = (rng.random((rows, groups)) + 1e-3).astype(dtype)
    layout = layout_for(codes.shape, f"int{bits}", groups, dtype)
    packed = pack(layout, codes, scales)
    assert packed.dtype == np.uint8 and packed.nbytes == layout.size_bytes and layout.size_bytes % 64 == 0
    want = dequantize(torch.from_numpy(codes), torch.from_numpy(scales)).numpy()
    np.testing.assert_array_equal(unpack(layout, packed).view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
def test_floats_of_sixteen_bits_come_back(scheme):
    numbers = torch.randn(20, 300).to(torch.float16 if scheme == "fp16" else torch.bfloat16)
    stored = numbers.numpy() if scheme == "fp16" else numbers.view(torch.int16).numpy().view(np.uint16)
    layout = layout_for((20, 300), scheme)
    np.testing.assert_array_equal(unpack(layout, pack(layout, stored)), numbers.float().numpy())


def test_a_code_lies_where_the_docstring_says():
    codes = np.zeros((20, 32), np.int8)
    codes[17, 8 + 4 + 2] = 5
    layout = layout_for(codes.shape, "int4")
    panel = pack(layout, codes, np.ones((20, 1), np.float16)).reshape(2, -1)[1]
    assert layout.scale_bytes == 64
    byte = panel[64:].reshape(4, 16, 4)[1, 1, 2]
    assert byte == (5 + 8) << 4 | 8


def test_gate_and_up_alternate_every_sixteen_rows():
    gate, up = np.full((20, 3), 1), np.full((20, 3), 2)
    rows = interleave(gate, up)[:, 0]
    np.testing.assert_array_equal(rows, [1] * 16 + [2] * 16 + [1] * 4 + [0] * 12 + [2] * 4 + [0] * 12)


@pytest.mark.parametrize("shape, groups", [((4, 24), 2), ((4, 10), 3), ((4, 12), 12)])
def test_groups_that_eight_does_not_divide_are_refused(shape, groups):
    with pytest.raises(VL2Error, match="cannot hold"):
        layout_for(shape, "int4", groups)


def test_unknown_schemes_are_refused():
    with pytest.raises(VL2Error, match="no scheme 'int3'"):
        layout_for((4, 32), "int3")


def test_the_writer_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import vl2.plugins.native.layout"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""`vl2::VisionAttention` and its eager reference: against each other, the tower's attention, and at the edges."""

from __future__ import annotations

import functools
import os

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from tests.plugins.attention_session import needs_library
from tests.plugins.operator_session import ISAS, node_session
from tests.tolerances import ATTENTION, assert_close
from vl2.config import VisionConfig
from vl2.model.vision import VisionAttention
from vl2.plugins.vision_attention.op import TracedVisionAttention, vision_attention

# tiles, tokens, heads, head size
CASES = {"siglip": (1, 729, 2, 72), "two tiles of the miniatures": (2, 729, 4, 16), "nano": (1, 576, 6, 32),
         "odd": (3, 37, 5, 9), "one token": (2, 1, 3, 6), "no tile": (0, 5, 2, 4), "no token": (2, 0, 2, 4),
         "wide": (1, 50, 2, 130)}  # fmt: skip


def random_rows(tiles: int, tokens: int, heads: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tiles, tokens, 3 * heads * size, generator=torch.Generator().manual_seed(seed))


@functools.cache
def session(heads: int, scale: float, isa: str, threads: int) -> onnxruntime.InferenceSession:
    before = os.environ.get("VL2_CPU_ISA", "")
    os.environ["VL2_CPU_ISA"] = isa or before
    try:
        return node_session("VisionAttention", {"x": np.empty(0)}, {"heads": heads, "scale": scale}, threads)
    finally:
        os.environ["VL2_CPU_ISA"] = before


def run(qkv: torch.Tensor, heads: int, scale: float, isa: str = "", threads: int = 1) -> torch.Tensor:
    return torch.from_numpy(session(heads, scale, isa, threads).run(None, {"x": qkv.numpy()})[0])


def assert_equal_to_reference(case: tuple[int, int, int, int], isa: str = "", seed: int = 0) -> None:
    qkv, heads, scale = random_rows(*case, seed), case[2], case[3] ** -0.5
    assert_close(run(qkv, heads, scale, isa), vision_attention(qkv, heads, scale), ATTENTION)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_references_on_every_instruction_set(name, isa):
    assert_equal_to_reference(CASES[name], isa)


@needs_library
@settings(max_examples=15)
@given(tiles=st.integers(1, 2), tokens=st.integers(1, 150), heads=st.integers(1, 4), size=st.integers(1, 80),
       isa=st.sampled_from(ISAS or [""]), seed=st.integers(0, 99))
def test_any_sizes_agree(tiles, tokens, heads, size, isa, seed):
    assert_equal_to_reference((tiles, tokens, heads, size), isa, seed)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_neither_threads_nor_other_tiles_change_a_bit(isa):
    qkv = random_rows(3, 200, 3, 24)
    whole = run(qkv, 3, 0.2, isa)
    assert all(torch.equal(run(qkv, 3, 0.2, isa, threads), whole) for threads in (2, 64))
    assert all(torch.equal(run(qkv[i : i + 1], 3, 0.2, isa)[0], whole[i]) for i in range(3))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_in_its_tile_and_head(bad, isa):
    # of what the first head of the second tile gives: a query its own row, a value its column, a key what NaN reaches
    for part, rows, columns in ((0, slice(7, 8), slice(8)), (1, slice(40), slice(8)), (2, slice(40), slice(3, 4))):
        qkv = random_rows(2, 40, 2, 8)
        qkv[1, 7, part * 16 + 3] = bad
        reference, y = vision_attention(qkv, 2, 0.3), run(qkv, 2, 0.3, isa)
        assert y[0].isfinite().all() and y[1, :, 8:].isfinite().all()
        touched = y[1, rows, columns][~reference[1, rows, columns].isfinite()]
        assert touched.numel() and not touched.isfinite().any()


@needs_library
def test_scores_that_differ_by_hundreds_leave_one_key():
    qkv = random_rows(1, 90, 1, 16)
    qkv[0, :, :32] *= 100
    assert_close(run(qkv, 1, 1.0), vision_attention(qkv, 1, 1.0), ATTENTION)


@needs_library
@pytest.mark.parametrize("heads, shape, message", [
    (2, (1, 4, 10), r"qkv has 10 columns, expected a multiple of 3 \* 2"),
    (4, (1, 4, 8), r"qkv has 8 columns, expected a multiple of 3 \* 4"),
    (2, (4, 12), r"qkv has the shape \[4, 12\], expected 3 sides"),
    (0, (1, 4, 12), "heads is 0, expected a number above 0"),
])  # fmt: skip
def test_wrong_inputs_are_refused_in_words(heads, shape, message):
    with pytest.raises((Fail, InvalidArgument, RuntimeException), match=message):
        run(torch.zeros(shape), heads, 1.0)


@torch.no_grad()
def test_the_substitute_computes_what_the_tower_computes():
    torch.manual_seed(0)
    whole = VisionAttention(VisionConfig(width=48, heads=4))
    x = torch.randn(2, 30, 48)
    assert_close(TracedVisionAttention(whole)(x), whole(x), ATTENTION)


def test_the_operator_is_registered_as_torch_wants_it():
    call = random_rows(2, 5, 3, 4), 3, 0.5
    torch.library.opcheck(vision_attention, call, test_utils=("test_schema", "test_faketensor"))

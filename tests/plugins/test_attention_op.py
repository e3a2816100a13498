"""`vl2::Attention` and its eager reference: against each other, against the model's attention, and at the edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from tests.plugins.attention_session import (
    DTYPES,
    Sizes,
    arguments,
    caches_are_equal,
    in_parts,
    needs_library,
    reference,
    run,
)
from tests.plugins.operator_session import ISAS
from tests.tolerances import ATTENTION, CACHE_FLOAT16, CACHE_INT8, assert_close
from vl2.config import LanguageConfig
from vl2.errors import VL2Error
from vl2.model.attention import Attention
from vl2.model.decoder import additive_mask
from vl2.model.rope import rope_tables
from vl2.plugins.attention.cache import quantize_rows
from vl2.plugins.attention.op import INPUTS, TracedAttention, attention

# tokens, past, heads, kv heads, head size
CASES = {
    "tiny decode": Sizes(1, (333,), 10, 10, 128), "tiny prefill": Sizes(70, (0,), 10, 10, 128),
    "tiny chunk": Sizes(33, (130,), 2, 2, 128), "tiny-mini": Sizes(9, (5,), 6, 6, 16),
    "nano": Sizes(1, (40,), 4, 4, 32), "first token": Sizes(1, (0,), 10, 10, 128), "long": Sizes(1, (1500,), 2, 2, 16),
    "two of a long past": Sizes(2, (900,), 1, 1, 64), "grouped decode": Sizes(1, (90,), 8, 2, 32),
    "grouped wide decode": Sizes(1, (50,), 8, 1, 32), "grouped prefill": Sizes(20, (7,), 6, 3, 10),
    "odd": Sizes(5, (3,), 3, 3, 6), "batch": Sizes(1, (100, 31), 8, 2, 20), "batch prefill": Sizes(3, (0, 12), 4, 4, 8),
}  # fmt: skip


def assert_equal_to_reference(call, isa: str = "", threads: int = 1) -> None:
    other = call.copy()
    want = reference(call)
    assert_close(run(other, isa, threads), want, ATTENTION)
    assert caches_are_equal(other, call)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_caches_are_the_references(name, dtype):
    assert_equal_to_reference(arguments(CASES[name], dtype))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["tiny decode", "tiny chunk", "grouped wide decode", "odd", "two of a long past"])
def test_every_instruction_set_agrees(name, isa):
    for dtype in DTYPES:
        assert_equal_to_reference(arguments(CASES[name], dtype, seed=1), isa)


@needs_library
@settings(max_examples=15)
@given(tokens=st.integers(0, 70), past=st.lists(st.integers(0, 200), min_size=1, max_size=2),
       kv_heads=st.integers(1, 3), group=st.integers(1, 6), half=st.integers(1, 20),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_any_sizes_agree(tokens, past, kv_heads, group, half, dtype, seed):
    assert_equal_to_reference(arguments(Sizes(tokens, tuple(past), kv_heads * group, kv_heads, 2 * half), dtype, seed))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1,) * 12, (5, 7), (1, 10, 1)])
def test_chunks_and_steps_are_the_whole_prefill(lengths, dtype):
    whole, parts = (arguments(Sizes(12, (70,), 4, 2, 16), dtype) for _ in range(2))
    assert_close(in_parts(parts, lengths, run), run(whole), ATTENTION)
    assert caches_are_equal(parts, whole)


@needs_library
@pytest.mark.parametrize("name", ["tiny decode", "long", "grouped prefill"])
def test_the_number_of_threads_changes_no_bit(name):
    call = arguments(CASES[name], torch.float16)
    outputs = [run(call.copy(), threads=threads) for threads in (1, 2, 64)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def model_attention(**changes) -> tuple[LanguageConfig, Attention]:
    config = LanguageConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, use_mla=False, **changes)
    torch.manual_seed(0)
    return config, Attention(config)


@torch.no_grad()
def test_the_substitute_computes_what_the_model_computes():
    config, whole = model_attention()
    x, tokens = torch.randn(2, 9, 64), 9
    rope = rope_tables(config, torch.arange(tokens).expand(2, tokens), tokens)
    want, entries = whole(x, additive_mask(torch.ones(2, tokens, dtype=torch.bool), tokens, x.dtype), rope, ())
    caches = tuple(torch.full((2, 16, 2, 16), torch.nan) for _ in range(2))
    traced = TracedAttention(whole)
    got = [traced(x[:, i:j], None, tuple(table[:, i:j] for table in rope), (*caches, torch.tensor(i)))[0]
           for i, j in ((0, 4), (4, 8), (8, 9))]
    assert_close(torch.cat(got, dim=1), want, ATTENTION)
    for cache, entry in zip(caches, entries, strict=True):
        assert_close(cache[:, :tokens], entry, ATTENTION)
        assert cache[:, tokens:].isnan().all()


@pytest.mark.parametrize("dtype, bound", [(torch.float16, CACHE_FLOAT16), (torch.int8, CACHE_INT8)])
def test_a_narrow_cache_costs_its_rounding(dtype, bound):
    sizes = Sizes(300, (0,), 4, 4, 64)
    assert_close(reference(arguments(sizes, dtype)), reference(arguments(sizes)), bound)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_reaches_its_own_and_later_tokens(dtype, bad):
    call = arguments(Sizes(40, (3,), 2, 2, 8), dtype)
    call.tensors["key"][0, 20, 1] = bad
    for output in (run(call.copy()), reference(call.copy())):
        heads = output.unflatten(-1, (2, 8)).isnan().all(-1)[0]
        assert heads[20, 0] and not heads[:20].any() and not heads[:, 1].any()


@needs_library
def test_scores_of_minus_infinity_weigh_nothing():
    call = arguments(Sizes(1, (600,), 2, 2, 8))
    call.tensors["query"] = torch.ones(1, 1, 16)
    call.tensors["sin"].zero_(), call.tensors["cos"].fill_(1)
    call.tensors["key_cache"][0, :500] = -torch.inf
    assert_equal_to_reference(call)


@needs_library
def test_no_tokens_give_no_rows():
    call = arguments(Sizes(0, (4,), 2, 2, 8))
    before = call.copy()
    assert run(call).shape == (1, 0, 16) and caches_are_equal(call, before)


@needs_library
@pytest.mark.parametrize("changes, message", [
    ({"past_length": torch.tensor(3)}, "past_length is 3 with 4 new tokens, but the cache has room for 6"),
    ({"past_length": torch.tensor(-1)}, "past_length is -1"),
    ({"past_length": torch.zeros(3, dtype=torch.int64)}, r"past_length has the shape \[3\], expected \[1\]"),
    ({"query": torch.zeros(1, 4, 30)}, "query has 30 columns, expected a multiple of key_cache's 2 heads of 8"),
    ({"query": torch.zeros(4, 32)}, r"query has the shape \[4, 32\], expected 3 sides"),
    ({"value": torch.zeros(1, 4, 8)}, r"value has the shape \[1, 4, 8\], expected \[1, 4, 16\]"),
    ({"cos": torch.zeros(1, 3, 8)}, r"cos has the shape \[1, 3, 8\], expected \[1, 4, 8\]"),
    ({"key_cache": torch.zeros(1, 6, 2, 7)}, "the head size is 7, expected an even number"),
    ({"value_cache": torch.zeros(1, 5, 2, 8)}, r"value_cache has the shape \[1, 5, 2, 8\]"),
    ({"value_cache": torch.zeros(1, 6, 2, 8, dtype=torch.float16)}, "value_cache and key_cache differ in element type"),
    ({name: torch.zeros(1, 6, 2, 8, dtype=torch.int64) for name in ("key_cache", "value_cache")},
     "key_cache has the element type 7, expected float32, float16 or int8"),
    ({name: torch.zeros(1, 6, 2, 8, dtype=torch.int8) for name in ("key_cache", "value_cache")},
     "key_cache's scale is missing"),
    ({name: torch.zeros(1, 6, 2) for name in ("key_scale", "value_scale")}, "key_cache's scale is given, but only"),
])  # fmt: skip
def test_wrong_inputs_are_refused_in_words(changes, message):
    call = arguments(Sizes(4, (0,), 4, 2, 8))
    call.tensors |= {"key_cache": torch.zeros(1, 6, 2, 8), "value_cache": torch.zeros(1, 6, 2, 8)} | changes
    with pytest.raises((Fail, InvalidArgument, RuntimeException), match=message):
        run(call)


def test_the_reference_refuses_rows_that_do_not_fit():
    call = arguments(Sizes(4, (2,), 2, 2, 8)).changed(past_length=torch.tensor(7))
    with pytest.raises(VL2Error, match="past_length is 7 with 4 new tokens, the cache has room for 9"):
        reference(call)


def test_int8_rows_are_symmetric_and_odd_ones_are_named():
    x = torch.tensor([[1.0, -2.0, 0.5], [0, 0, 0], [1, torch.nan, 2], [torch.inf, 1, 1], [1e-44, 0, 0]])
    codes, scale = quantize_rows(x)
    assert codes[:2].tolist() == [[64, -127, 32], [0, 0, 0]] and codes[2:].eq(0).all()
    assert scale[0] == torch.tensor(2.0) / 127 and scale[1] == scale[4] == 0 and scale[2:4].isnan().all()


def test_the_operator_is_registered_as_torch_wants_it():
    call = arguments(Sizes(3, (2,), 4, 2, 8), torch.float16)
    given_to_it = (*call.tensors.values(), call.scale)
    torch.library.opcheck(attention, given_to_it, test_utils=("test_schema", "test_faketensor"))
    assert tuple(call.tensors) == INPUTS

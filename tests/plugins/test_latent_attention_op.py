"""`vl2::LatentAttention` and its eager reference: against each other, the model's two forms, and at the edges."""

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
from vl2.config import LanguageConfig, RopeScaling
from vl2.model.attention import LatentAttention
from vl2.model.decoder import additive_mask
from vl2.model.rope import rope_tables
from vl2.plugins.latent_attention.op import INPUTS, TracedLatentAttention, latent_attention

CASES = {
    "small decode": Sizes(1, (333,), 16, rank=512, rope=64), "small prefill": Sizes(20, (0,), 16, rank=512, rope=64),
    "small chunk": Sizes(5, (130,), 16, rank=512, rope=64), "base decode": Sizes(1, (70,), 32, rank=512, rope=64),
    "small-mini": Sizes(1, (50,), 4, rank=48, rope=16), "base-mini": Sizes(9, (3,), 8, rank=32, rope=8),
    "long": Sizes(1, (1500,), 4, rank=32, rope=8), "odd": Sizes(9, (3,), 5, rank=33, rope=10),
    "first token": Sizes(1, (0,), 16, rank=512, rope=64), "batch": Sizes(2, (90, 11), 3, rank=20, rope=6),
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
@pytest.mark.parametrize("name", ["small decode", "base-mini", "odd"])
def test_every_instruction_set_agrees(name, isa):
    for dtype in DTYPES:
        assert_equal_to_reference(arguments(CASES[name], dtype, seed=1), isa)


@needs_library
@settings(max_examples=15)
@given(tokens=st.integers(0, 40), past=st.lists(st.integers(0, 200), min_size=1, max_size=2), heads=st.integers(1, 18),
       rank=st.integers(1, 90), half=st.integers(1, 20), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_any_sizes_agree(tokens, past, heads, rank, half, dtype, seed):
    assert_equal_to_reference(arguments(Sizes(tokens, tuple(past), heads, rank=rank, rope=2 * half), dtype, seed))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1,) * 12, (5, 7), (1, 10, 1)])
def test_chunks_and_steps_are_the_whole_prefill(lengths, dtype):
    whole, parts = (arguments(Sizes(12, (70,), 4, rank=48, rope=16), dtype) for _ in range(2))
    assert_close(in_parts(parts, lengths, run), run(whole), ATTENTION)
    assert caches_are_equal(parts, whole)


@needs_library
@pytest.mark.parametrize("name", ["small decode", "long", "base-mini"])
def test_the_number_of_threads_changes_no_bit(name):
    call = arguments(CASES[name], torch.float16)
    outputs = [run(call.copy(), threads=threads) for threads in (1, 2, 64)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


RANKED = {"q_lora_rank": 24}
YARN = RopeScaling(type="yarn", factor=40.0, mscale=0.707, mscale_all_dim=0.707)


@pytest.mark.parametrize("changes", [{}, RANKED, {"rope_scaling": YARN}], ids=["plain", "query rank", "yarn"])
@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "naive"])
@torch.no_grad()
def test_the_substitute_computes_what_the_model_computes(changes, absorbed):
    config = LanguageConfig(hidden_size=64, num_attention_heads=4, use_mla=True, kv_lora_rank=32, qk_rope_head_dim=8,
                            qk_nope_head_dim=16, v_head_dim=12, **({"q_lora_rank": None} | changes))
    torch.manual_seed(0)
    whole = LatentAttention(config)
    whole.absorbed = absorbed
    x, tokens = torch.randn(2, 9, 64), 9
    rope = rope_tables(config, torch.arange(tokens).expand(2, tokens), tokens)
    want, (entries,) = whole(x, additive_mask(torch.ones(2, tokens, dtype=torch.bool), tokens, x.dtype), rope, ())
    cache, traced = torch.full((2, 16, 40), torch.nan), TracedLatentAttention(whole)
    got = [traced(x[:, i:j], None, tuple(table[:, i:j] for table in rope), (cache, torch.tensor(i)))[0]
           for i, j in ((0, 4), (4, 8), (8, 9))]
    assert_close(torch.cat(got, dim=1), want, ATTENTION)
    assert_close(cache[:, :tokens], entries, ATTENTION)
    assert cache[:, tokens:].isnan().all()


@pytest.mark.parametrize("dtype, bound", [(torch.float16, CACHE_FLOAT16), (torch.int8, CACHE_INT8)])
def test_a_narrow_cache_costs_its_rounding(dtype, bound):
    sizes = Sizes(100, (0,), 4, rank=128, rope=32)
    assert_close(reference(arguments(sizes, dtype)), reference(arguments(sizes)), bound)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_reaches_later_tokens_of_every_head(dtype, bad):
    call = arguments(Sizes(40, (3,), 2, rank=8, rope=4), dtype)
    call.tensors["key_rope"][0, 20, 1] = bad
    for output in (run(call.copy()), reference(call.copy())):
        rows = output.isnan().all(-1)[0]
        assert rows[:, 20].all() and not rows[:, :20].any()


@needs_library
def test_no_tokens_give_no_rows():
    call = arguments(Sizes(0, (4,), 2, rank=8, rope=4))
    before = call.copy()
    assert run(call).shape == (1, 2, 0, 8) and caches_are_equal(call, before)


@needs_library
@pytest.mark.parametrize("changes, message", [
    ({"past_length": torch.tensor(5)}, "past_length is 5 with 4 new tokens, but the cache has room for 7"),
    ({"query": torch.zeros(1, 4, 16)}, r"query has the shape \[1, 4, 16\], expected 4 sides"),
    ({"query_rope": torch.zeros(1, 2, 4, 4)}, r"query_rope has the shape \[1, 2, 4, 4\], expected \[1, 4, 2, 4\]"),
    ({"latent": torch.zeros(1, 4, 7)}, r"latent has the shape \[1, 4, 7\], expected \[1, 4, 8\]"),
    ({"key_rope": torch.zeros(1, 4, 3)}, "key_rope has 3 columns, expected an even number"),
    ({"cache": torch.zeros(1, 7, 13)}, r"cache has the shape \[1, 7, 13\], expected \[1, 7, 12\]"),
    ({"cache": torch.zeros(1, 7, 12, dtype=torch.int8)}, "cache's scale is missing"),
    ({"cache": torch.zeros(1, 7, 12, dtype=torch.int8), "cache_scale": torch.zeros(1, 7)},
     r"cache's scale has the shape \[1, 7\], expected \[1, 7, 2\]"),
])  # fmt: skip
def test_wrong_inputs_are_refused_in_words(changes, message):
    call = arguments(Sizes(4, (0,), 2, rank=8, rope=4))
    call.tensors |= changes
    with pytest.raises((Fail, InvalidArgument, RuntimeException), match=message):
        run(call)


def test_the_operator_is_registered_as_torch_wants_it():
    call = arguments(Sizes(3, (2,), 4, rank=8, rope=4), torch.float16)
    arguments_of_call = (*call.tensors.values(), call.scale)
    torch.library.opcheck(latent_attention, arguments_of_call, test_utils=("test_schema", "test_faketensor"))
    assert tuple(call.tensors) == INPUTS

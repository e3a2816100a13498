"""Rows of one decode step do not depend on each other: any slots, any lengths, the bits of single runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from tests.plugins.attention_session import DTYPES, Arguments, Sizes, arguments, needs_library, reference, run
from tests.plugins.operator_session import ISAS, node_session, random_matrix
from tests.plugins.test_experts_operator import CASES, Case, Layer, inputs_of
from tests.plugins.test_experts_operator import run as run_experts
from tests.tolerances import ATTENTION, assert_close
from vl2.errors import VL2Error

pytestmark = needs_library
FEW_ROWS = 8
# Tiny's heads, grouped ones, latent attention of Small, an odd size.
HEADS = {"plain": {"heads": 10, "kv_heads": 10, "size": 128}, "grouped": {"heads": 6, "kv_heads": 2, "size": 20},
         "wide group": {"heads": 8, "kv_heads": 1, "size": 16},
         "latent": {"heads": 4, "rank": 48, "rope": 16}}  # fmt: skip
REFUSED = (Fail, InvalidArgument, RuntimeException)


def in_slots(call: Arguments, slots: list[int], count: int) -> Arguments:
    """The same call with its sequences in rows `slots` of caches of `count` rows; the others must not be read."""
    changed = {"cache_row": torch.tensor(slots)}
    for name, cache in call.caches.items():
        whole = torch.full((count, *cache.shape[1:]), 99 if cache.dtype == torch.int8 else torch.nan, dtype=cache.dtype)
        whole[slots] = cache
        changed[name] = whole
    return call.changed(**changed)


def alone(call: Arguments, b: int) -> Arguments:
    """Row b of a batch as a call of its own, without slots."""
    tensors = {name: tensor if tensor is None else tensor[b : b + 1].clone() for name, tensor in call.tensors.items()}
    return Arguments(call.module, tensors, call.scale)


def assert_rows_are_single_runs(call: Arguments, slots: list[int], count: int, threads: int = 1) -> None:
    placed = in_slots(call, slots, count)
    before = placed.copy()
    y = run(placed, threads=threads)
    for b, slot in enumerate(slots):
        single = alone(call, b)
        assert torch.equal(y[b], run(single, threads=threads)[0])
        for name, cache in single.caches.items():
            assert np.array_equal(placed.tensors[name][slot].numpy().view(np.uint8), cache[0].numpy().view(np.uint8))
    others = sorted(set(range(count)) - set(slots))
    for name, cache in before.caches.items():
        found = placed.tensors[name][others]
        assert np.array_equal(found.numpy().view(np.uint8), cache[others].numpy().view(np.uint8))


@settings(max_examples=12)
@given(tokens=st.sampled_from((1, 1, 1, 4)), past=st.lists(st.integers(0, 300), min_size=2, max_size=FEW_ROWS),
       name=st.sampled_from(list(HEADS)), dtype=st.sampled_from(DTYPES), threads=st.sampled_from((1, 3)),
       spare=st.integers(0, 4), seed=st.integers(0, 99))
def test_sequences_in_any_slots_are_their_single_runs_bit_for_bit(tokens, past, name, dtype, threads, spare, seed):
    call = arguments(Sizes(tokens, tuple(past), **HEADS[name]), dtype, seed)
    slots = np.random.default_rng(seed).permutation(len(past) + spare)[: len(past)].tolist()
    assert_rows_are_single_runs(call, slots, len(past) + spare, threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HEADS)
def test_slots_of_the_kernel_are_the_references(name, dtype):
    call = in_slots(arguments(Sizes(2, (40, 7, 0), **HEADS[name]), dtype), [4, 0, 3], 5)
    other = call.copy()
    assert_close(run(other), reference(call), ATTENTION)
    for key, cache in call.caches.items():
        assert np.array_equal(other.tensors[key].numpy().view(np.uint8), cache.numpy().view(np.uint8))


@pytest.mark.parametrize("name", ["plain", "latent"])
@pytest.mark.parametrize("rows, message, told", [
    ([0, 5], "cache_row is 5, but the cache has 5 rows", "cache_row is 5, the cache has 5 rows"),
    ([-1, 0], "cache_row is -1", "cache_row is -1"),
    ([2, 2], "cache_row has 2 twice", "has a row twice"),
    ([0, 1, 2], r"cache_row has the shape \[3\], expected \[2\]", None),
])  # fmt: skip
def test_slots_that_are_not_there_or_taken_are_refused_in_words(name, rows, message, told):
    call = in_slots(arguments(Sizes(1, (3, 9), **HEADS[name])), [0, 1], 5).changed(cache_row=torch.tensor(rows))
    with pytest.raises(REFUSED, match=message):
        run(call)
    if told:
        with pytest.raises(VL2Error, match=told):
            reference(call)


def test_without_slots_the_caches_have_a_row_a_sequence():
    call = arguments(Sizes(1, (3, 9), **HEADS["plain"]))
    changed = {name: torch.cat([cache, cache]) for name, cache in call.caches.items()}
    with pytest.raises(REFUSED, match=r"key_cache has the shape \[4, "):
        run(call.changed(**changed))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("shape, scheme, groups", [
    ((80, 1280), "int4", 40), ((40, 1280), "int8", 1), ((33, 96), "int4", 3), ((20, 40), "int4", 5),
    ((37, 301), "int8", 1),
    ((33, 1152), "fp16", 1), ((21, 301), "bf16", 1),
])  # fmt: skip
def test_few_rows_of_a_linear_are_each_alone(isa, mode, shape, scheme, groups, monkeypatch):
    monkeypatch.setenv("VL2_CPU_ISA", isa)
    matrix = random_matrix(shape, scheme, groups)
    attributes = {"N": matrix.layout.rows, "K": matrix.layout.columns, "mode": mode} | matrix.form
    session = node_session("Linear", {"x": True, "weight": matrix.packed}, attributes)
    x = np.random.default_rng(1).standard_normal((FEW_ROWS, shape[1])).astype(np.float32)
    each = np.concatenate([session.run(None, {"x": row[None]})[0] for row in x])
    for count in range(1, FEW_ROWS + 1):
        assert np.array_equal(session.run(None, {"x": x[:count]})[0], each[:count]), count


def mixed_layer() -> tuple[Layer, dict]:
    """Routed experts that no kernel rounds for, beside shared ones that some do, and the attributes that say so."""
    layer = Layer(Case(96, 48, 8, 3, columns=16, shared=64))
    layer.shared = Layer(Case(96, 48, 2, 1, scheme="int8", columns=32, shared=64)).shared
    return layer, {f"shared_{part}{key}": value for part in ("", "down_")
                   for key, value in (("scheme", "int8"), ("group_size", 32))}  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("name", ["base", "small", "odd sizes", "odd floats", "mixed"])
def test_few_tokens_of_the_experts_are_each_alone(isa, mode, name, monkeypatch):
    monkeypatch.setenv("VL2_CPU_ISA", isa)
    layer, changes = mixed_layer() if name == "mixed" else (Layer(CASES[name]), {})
    session = layer.session(mode, **changes)
    x, logits = inputs_of(layer.case, FEW_ROWS)
    each = np.concatenate([run_experts(session, x[i : i + 1], logits[i : i + 1]) for i in range(FEW_ROWS)])
    for count in range(2, FEW_ROWS + 1):
        assert np.array_equal(run_experts(session, x[:count], logits[:count]), each[:count]), count

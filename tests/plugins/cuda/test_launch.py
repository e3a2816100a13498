"""Launch plans keep within what every GPU from 8.0 on allows, for every shape and number of tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plugins.cuda.experts_layer import LAYERS, stored
from vl2.plugins.cuda.attention import AttentionProblem, attention_plan
from vl2.plugins.cuda.experts import experts_plan
from vl2.plugins.cuda.latent import LatentProblem, latent_plan
from vl2.plugins.cuda.launch import Plan, workspace_bytes
from vl2.plugins.cuda.linear import LinearProblem, linear_plan
from vl2.plugins.cuda.storage import Storage

SCHEMES = st.sampled_from(("int4", "int8", "fp16"))
TOKENS = st.integers(1, 4096)


def check(plan: Plan, inputs: set[str]) -> None:
    """Limits of CUDA, and that every buffer is an input, an output or scratch that some launch before wrote."""
    for launch in plan.launches:
        x, y, z = launch.grid
        assert 0 < x < 2**31 and 0 < y < 65536 and 0 < z < 65536, launch
        assert launch.block[0] % 32 == 0 and launch.block[0] <= 256 and launch.block[1:] == (1, 1)
        assert 0 <= launch.shared_bytes <= 99 << 10, launch
        names = {argument for argument in launch.arguments if isinstance(argument, str)}
        assert names <= inputs | set(plan.workspace), names
        numbers = [argument for argument in launch.arguments if isinstance(argument, int)]
        assert all(-(2**31) <= number < 2**31 for number in numbers), launch
    assert all(size > 0 for size in plan.workspace.values()) and workspace_bytes(plan) < 2**32


@pytest.mark.parametrize("name", LAYERS)
@given(scheme=SCHEMES, tokens=TOKENS)
def test_every_layer_can_be_launched(name: str, scheme: str, tokens: int) -> None:
    problem = stored(LAYERS[name], Storage(scheme, 64 if scheme != "fp16" else 0))
    names = {"x", "logits", "correction_bias", "y"}
    for weight in ("gate", "up", "down"):
        names |= {f"{prefix}{weight}{end}" for prefix in ("", "shared_") for end in ("", "_scale")}
    check(experts_plan(replace(problem, routing=replace(problem.routing, tokens=tokens))), names)


@given(scheme=SCHEMES, tokens=TOKENS, rows=st.integers(1, 200000), chunks=st.integers(1, 1024))
def test_every_product_can_be_launched(scheme: str, tokens: int, rows: int, chunks: int) -> None:
    storage = Storage(scheme, 0 if scheme == "fp16" else 16)
    check(linear_plan(LinearProblem(tokens, rows, chunks * 16, storage)), {"x", "weight", "weight_scale", "y"})


@given(tokens=TOKENS, heads=st.integers(1, 128), rank=st.sampled_from((32, 48, 512)), batch=st.integers(1, 4))
def test_every_latent_attention_can_be_launched(tokens: int, heads: int, rank: int, batch: int) -> None:
    problem = LatentProblem(batch, heads, tokens, rank, 64, 4096, 0.1)
    assert problem.sizes.splits * problem.sizes.chunk >= problem.capacity
    names = {"query", "query_rope", "latent", "key_rope", "cos", "sin", "cache", "past_length", "y"}
    check(latent_plan(problem), names)


@given(tokens=TOKENS, kv_heads=st.integers(1, 40), group=st.integers(1, 8), size=st.sampled_from((16, 64, 128, 256)))
def test_every_attention_can_be_launched(tokens: int, kv_heads: int, group: int, size: int) -> None:
    problem = AttentionProblem(1, kv_heads * group, kv_heads, tokens, size, 4096, 0.1)
    names = {"query", "key", "value", "cos", "sin", "key_cache", "value_cache", "past_length", "y"}
    check(attention_plan(problem), names)

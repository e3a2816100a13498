"""Scratch memory is asked for every plan that a profile can lead to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from tests.plugins.tensorrt.test_operators import EXPERTS
from vl2.plugins.cuda.attention import AttentionProblem
from vl2.plugins.cuda.latent import LatentProblem
from vl2.plugins.cuda.launch import workspace_bytes
from vl2.plugins.tensorrt.operators import OPERATORS
from vl2.plugins.tensorrt.plugin import largest_workspace, shapes_between

Shapes = dict[str, tuple[int, ...]]
TOKENS, CAPACITY = 512, 5000
# Around multiples of the shortest split, where the number of splits changes.
CAPACITIES = [*(64 * count + step for count in range(8, 70, 13) for step in (-1, 0, 1)), 4096, 4112, CAPACITY]


def heads_shapes(heads: int, size: int) -> Callable[[int, int], Shapes]:
    def shapes(tokens: int, capacity: int) -> Shapes:
        new = dict.fromkeys(("query", "key", "value"), (1, tokens, heads * size))
        held = dict.fromkeys(("key_cache", "value_cache"), (1, capacity, heads, size))
        return {**new, "cos": (1, tokens, size), "sin": (1, tokens, size), **held, "past_length": ()}

    return shapes


def latent_shapes(heads: int, rank: int, rope: int) -> Callable[[int, int], Shapes]:
    def shapes(tokens: int, capacity: int) -> Shapes:
        return {"query": (1, heads, tokens, rank), "query_rope": (1, tokens, heads, rope), "latent": (1, tokens, rank),
                **dict.fromkeys(("key_rope", "cos", "sin"), (1, tokens, rope)), "cache": (1, capacity, rank + rope),
                "past_length": ()}  # fmt: skip

    return shapes


def experts_shapes(tokens: int, capacity: int) -> Shapes:
    inputs = OPERATORS["Experts"].inputs(EXPERTS)
    return {**{tensor.name: (1,) for tensor in inputs}, "x": (tokens, 64), "logits": (tokens, 8)}


NODES = {
    "tiny": ("Attention", {"scale": 0.1}, heads_shapes(10, 128)),
    "nano": ("Attention", {"scale": 0.1}, heads_shapes(4, 32)),
    "small": ("LatentAttention", {"scale": 0.1}, latent_shapes(16, 512, 64)),
    "base": ("LatentAttention", {"scale": 0.1}, latent_shapes(32, 512, 64)),
    "experts": ("Experts", EXPERTS, experts_shapes),
}


def asked(name: str, tokens: int) -> int:
    """Workspace of a profile of 1 … tokens and of caches up to CAPACITY."""
    operator, attributes, shapes = NODES[name]
    low, high = shapes(1, 1), shapes(tokens, CAPACITY)
    return largest_workspace(operator, tuple(attributes.items()), tuple(zip(low.values(), high.values(), strict=True)))


def needed(name: str, sizes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Workspace of the plan at each number of tokens and capacity."""
    operator, attributes, shapes = NODES[name]
    plan = OPERATORS[operator].plan
    return {size: workspace_bytes(plan(attributes, shapes(*size))) for size in sizes}


@pytest.mark.parametrize("name", NODES)
def test_no_prefill_within_a_profile_needs_more_than_was_asked_for(name: str) -> None:
    found = needed(name, ((tokens, capacity) for tokens in range(1, TOKENS + 1)
                          for capacity in (CAPACITIES if name != "experts" else [CAPACITY])
                          if tokens <= capacity))  # fmt: skip
    worst = max(found, key=found.get)
    assert asked(name, TOKENS) >= found[worst], f"{worst[0]} tokens in a cache of {worst[1]}"
    assert asked(name, TOKENS) < 1.2 * found[worst], "scratch that no plan uses"


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_no_decode_step_needs_more_than_was_asked_for(name: str) -> None:
    found = needed(name, ((1, capacity) for capacity in range(1, CAPACITY + 1)))
    assert asked(name, 1) >= max(found.values())


def test_the_scratch_of_a_published_decoder_is_small() -> None:
    """Splits are made where there are few rows, and so their partial sums stay few."""
    assert asked("tiny", TOKENS) < 10e6 and asked("small", TOKENS) < 40e6


def test_a_decode_step_is_split_among_enough_blocks() -> None:
    tiny, small = AttentionProblem(1, 10, 10, 1, 128, 4096, 0.1), LatentProblem(1, 16, 1, 512, 64, 4096, 0.1)
    assert tiny.sizes.splits * tiny.sizes.heads > 400 and small.sizes.splits == 64


def test_every_number_of_tokens_is_looked_at_with_whole_caches() -> None:
    ranges = [((1, 1, 96), (1, 100, 96)), ((1, 1, 8), (1, 4096, 8)), ((), ())]
    found = shapes_between(["query", "cache", "past_length"], ranges)
    assert {query[1] for query, _, _ in found} == set(range(1, 101))
    assert {cache for _, cache, _ in found} == {(1, 4096, 8)} and {past for _, _, past in found} == {()}


def test_fixed_shapes_stay_one() -> None:
    assert shapes_between(["x"], [((4, 8), (4, 8))]) == {((4, 8),)}

"""Scratch memory is asked for every plan that a profile can lead to."""

from __future__ import annotations

from vl2.plugins.tensorrt.plugin import shapes_between


def test_token_counts_around_powers_of_two_are_looked_at_with_whole_caches() -> None:
    ranges = [((1, 1, 96), (1, 100, 96)), ((1, 1, 8), (1, 4096, 8)), ((), ())]
    found = shapes_between(["query", "cache", "past_length"], ranges)
    assert {1, 2, 3, 4, 5, 16, 17, 64, 65, 100} <= {query[1] for query, _, _ in found} <= set(range(1, 101))
    assert {cache for _, cache, _ in found} == {(1, 4096, 8)} and {past for _, _, past in found} == {()}


def test_fixed_shapes_stay_one() -> None:
    assert shapes_between(["x"], [((4, 8), (4, 8))]) == {((4, 8),)}

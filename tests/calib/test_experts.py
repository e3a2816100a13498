from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vl2.calib.experts import Routes, extra_tokens


def routes(scores: list[list[float]], idx: list[list[int]]) -> Routes:
    table = torch.tensor(scores)
    chosen = torch.tensor(idx)
    return Routes(chosen, table.gather(1, chosen), table)


TABLE = routes([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.5, 0.2], [0.2, 0.7, 0.1]], [[0], [1], [1], [1]])


def test_the_extra_tokens_are_the_nearest_that_were_not_routed_weighted_by_probability() -> None:
    extra = extra_tokens(TABLE, 0, wanted=3)
    assert extra.rows.tolist() == [2, 3]
    torch.testing.assert_close(extra.weights, torch.tensor([0.3, 0.2]) / 0.7)


def test_an_expert_without_tokens_weights_by_the_mean_of_the_nearest() -> None:
    extra = extra_tokens(TABLE, 2, wanted=2)
    assert extra.rows.tolist() == [1, 2]
    torch.testing.assert_close(extra.weights, torch.tensor([0.3, 0.2]) / 0.25)


def test_an_expert_with_enough_tokens_gets_no_others() -> None:
    assert len(extra_tokens(TABLE, 1, wanted=3).rows) == 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 40), experts=st.integers(2, 8), wanted=st.integers(1, 60))
def test_own_and_extra_tokens_are_apart_and_as_many_as_wanted(
    seed: int, tokens: int, experts: int, wanted: int
) -> None:
    scores = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)
    found = Routes(scores.topk(2).indices, scores.topk(2).values, scores)
    modality = torch.arange(tokens).remainder(2).to(torch.uint8)
    counts = found.counts(modality)
    assert int(counts.sum()) == 2 * tokens
    for e in range(experts):
        own, weights = found.of(e)
        assert weights.equal(scores[own, e]) and len(own) == int(counts[e].sum())
        extra = extra_tokens(found, e, wanted)
        assert not set(own.tolist()) & set(extra.rows.tolist())
        assert len(own) + len(extra.rows) == max(len(own), min(wanted, tokens))
        assert extra.weights.isfinite().all() and (extra.weights > 0).all()

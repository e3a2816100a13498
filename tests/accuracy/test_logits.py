"""The divergence against float64 and against brute force over what is not kept."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl2.accuracy.logits import divergence, keep, log_softmax
from vl2.errors import VL2Error

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=6, max_size=6).map(lambda x: np.array(x, np.float32))


def true_kld(a: np.ndarray, b: np.ndarray) -> float:
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (a, b))
    return float((p * np.log(p / q)).sum())


@given(LOGITS, LOGITS)
def test_with_all_tokens_kept_the_divergence_is_exact(a: np.ndarray, b: np.ndarray) -> None:
    found = divergence(keep(a, 6), b)
    assert found.kld == found.kld_most == pytest.approx(true_kld(a, b), abs=2e-6)
    assert found.same_top1 == (np.argmax(a) == np.argmax(b))


@given(LOGITS, LOGITS, st.integers(1, 5))
def test_with_some_kept_the_divergence_lies_between_the_bounds(a: np.ndarray, b: np.ndarray, top: int) -> None:
    found = divergence(keep(a, top), b)
    assert found.kld - 2e-6 <= true_kld(a, b) <= found.kld_most + 2e-6


@given(LOGITS, st.integers(1, 8), st.floats(-50, 50, width=32))
def test_equal_logits_have_a_divergence_of_exactly_nought(a: np.ndarray, top: int, shift: float) -> None:
    assert divergence(keep(a, top), a.copy()).kld == 0.0
    assert divergence(keep(a, top), a + np.float32(shift)).kld == pytest.approx(0, abs=1e-9)


def test_the_upper_bound_is_reached_by_the_worst_reference() -> None:
    # Two kept at 0.4 and 0.3; the other 0.3 may be one token of 0.3 on the least likely of q.
    q = np.log(np.array([0.3, 0.3, 0.05, 0.15, 0.2])).astype(np.float32)
    reached = []
    for spread in ([0.3, 0, 0], [0.15, 0.15, 0], [0.1, 0.1, 0.1]):
        for order in permutations(spread):
            p = np.array([0.4, 0.3, *order])
            used = p > 0
            reached.append(float((p[used] * (np.log(p[used]) - log_softmax(q)[used])).sum()))
    p = np.log(np.array([0.4, 0.3, 0.1, 0.1, 0.1])).astype(np.float32)
    assert divergence(keep(p, 2), q).kld_most == pytest.approx(max(reached), abs=1e-6)


def test_logits_that_are_not_finite_are_refused() -> None:
    for broken in (np.nan, np.inf, -np.inf):
        with pytest.raises(VL2Error, match="1 of 3 logits are not finite"):
            log_softmax(np.array([0, broken, 1], np.float32))


def test_the_likeliest_are_kept_in_the_order_of_their_ids() -> None:
    kept = keep(np.array([0, 5, -1, 4], np.float32), 2)
    assert kept.ids.tolist() == [1, 3] and kept.top1 == 1
    rest = np.exp([0, -1]).sum() / np.exp([0, 5, -1, 4]).sum()
    assert np.exp(kept.log_rest) == pytest.approx(rest)


def test_a_large_vocabulary_is_enclosed_closely_where_the_model_is_sure() -> None:
    random = np.random.default_rng(0)
    a = random.normal(0, 1, 20_000).astype(np.float32)
    a[random.integers(0, 20_000, 50)] += 14
    b = a + random.normal(0, 0.05, 20_000).astype(np.float32)
    found = divergence(keep(a, 1024), b)
    assert found.kld <= true_kld(a, b) <= found.kld_most
    # The others hold 1e-4; a tenth of int4's bar of 0.01 can hide there at most.
    assert found.kld_most - found.kld < 1e-3

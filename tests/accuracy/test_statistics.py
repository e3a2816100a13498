"""Statistics against brute force and against the textbook's special cases."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl2.accuracy.statistics import mcnemar, mean_with_error, paired_bootstrap, smallest_visible_effect

VALUES = st.lists(st.floats(-5, 5), min_size=2, max_size=30)


@given(VALUES)
def test_rows_that_are_their_own_cluster_have_the_ordinary_error(values: list[float]) -> None:
    found = mean_with_error(np.array(values), np.arange(len(values)))
    assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert found.se == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)), abs=1e-12)


@given(VALUES, st.integers(2, 5))
def test_repeating_every_row_in_its_cluster_adds_no_certainty(values: list[float], times: int) -> None:
    once = mean_with_error(np.array(values), np.arange(len(values)))
    repeated = mean_with_error(np.repeat(values, times), np.repeat(np.arange(len(values)), times))
    assert repeated.se == pytest.approx(once.se, abs=1e-12)


def test_one_cluster_tells_nothing_of_the_spread() -> None:
    assert mean_with_error(np.array([1.0, 2.0]), np.array([7, 7])).se is None


def test_a_clustered_error_worked_out_by_hand() -> None:
    # Mean 2; residual sums −3 and 3; √(2 · (9 + 9)) / 4.
    found = mean_with_error(np.array([0.0, 1.0, 3.0, 4.0]), np.array([0, 0, 1, 1]))
    assert (found.mean, found.se) == (2.0, pytest.approx(1.5))


def test_the_bootstrap_gives_the_percentiles_of_all_resamples() -> None:
    rows = np.array([[1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1], [1, 0, 1]], float)
    clusters = np.array([0, 0, 1, 2, 3])
    sums = np.array([rows[clusters == c].sum(axis=0) for c in range(4)])
    totals = np.array([sums[list(drawn)].sum(axis=0) for drawn in product(range(4), repeat=4)])
    differences = np.sort((totals[:, 1] - totals[:, 0]) / totals[:, 2])
    found = paired_bootstrap(rows, clusters).difference
    # 10,000 resamples place a percentile within ±0.5 % of all 256.
    for value, share in ((found.low, 2.5), (found.high, 97.5)):
        low, high = np.percentile(differences, [max(share - 0.5, 0), min(share + 0.5, 100)], method="inverted_cdf")
        assert low - 1e-12 <= value <= high + 1e-12


def test_the_bootstrap_of_a_large_sample_is_the_normal_interval() -> None:
    random = np.random.default_rng(1)
    rows = np.stack([np.zeros(400), random.normal(0.3, 1, 400), np.ones(400)], axis=1)
    found = paired_bootstrap(rows, np.arange(400)).difference
    mean, error = rows[:, 1].mean(), rows[:, 1].std(ddof=1) / 20
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.01)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.01)


def test_equal_models_have_no_interval_to_speak_of() -> None:
    rows = np.tile([1.0, 1.0, 1.0], (20, 1))
    found = paired_bootstrap(rows, np.arange(20))
    assert (found.difference.low, found.difference.high, found.ratio.low, found.ratio.high) == (0, 0, 1, 1)


def test_a_ratio_that_some_resample_cannot_give_is_not_given() -> None:
    rows = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    assert paired_bootstrap(rows, np.arange(2)).ratio is None


def test_a_row_without_weight_does_not_break_the_interval() -> None:
    found = paired_bootstrap(np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]), np.arange(2))
    assert (found.difference.low, found.difference.high) == (-1, -1)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_mcnemar_counts_every_way_the_changes_could_have_fallen(pairs: list[tuple[bool, bool]]) -> None:
    found = mcnemar(*np.array(pairs).T)
    lost, gained = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    ways = [sum(way) for way in product((0, 1), repeat=lost + gained)]
    extreme = sum(way <= min(lost, gained) for way in ways) / len(ways)
    assert (found.lost, found.gained, found.p) == (lost, gained, pytest.approx(min(1, 2 * extreme)))


def test_mcnemar_of_the_guides_table() -> None:
    # 29 lost and 5 gained: the guide says p ≈ 4e-5.
    reference = np.array([True] * 29 + [False] * 5 + [True] * 1766)
    candidate = np.array([False] * 29 + [True] * 5 + [True] * 1766)
    assert mcnemar(reference, candidate).p == pytest.approx(3.9e-5, rel=0.05)


def test_five_per_cent_of_flips_in_a_thousand_rows_show_two_points() -> None:
    differences = np.zeros(1000)
    differences[:25], differences[25:50] = 1, -1
    assert smallest_visible_effect(differences, np.arange(1000)) == pytest.approx(0.0198, abs=2e-4)


def test_no_flips_in_fifty_rows_do_not_show_that_there_are_none() -> None:
    assert smallest_visible_effect(np.zeros(50), np.arange(50)) > 0.09


def test_rows_that_all_lack_weight_have_no_interval() -> None:
    found = paired_bootstrap(np.zeros((3, 3)), np.arange(3))
    assert found.difference is None and found.ratio is None

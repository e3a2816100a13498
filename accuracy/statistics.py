"""How sure a difference is: clustered errors, the paired bootstrap, McNemar's exact test, the smallest visible effect.

Questions about one image are not independent, so rows come in clusters: int [n], equal for rows of the same image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_BLOCK_COUNTS = 4_000_000  # cluster counts drawn at once, 32 MB
# 97.5 % and 80 % points of the normal distribution: a two-sided test at 5 % that sees the effect four times in five.
_TEST_AND_POWER = 1.959964 + 0.841621


@dataclass(frozen=True)
class Mean:
    """se is None for a single cluster, which says nothing about the spread."""

    mean: float
    se: float | None


def mean_with_error(values: np.ndarray, clusters: np.ndarray) -> Mean:
    """The mean of values [n] and its standard error from the clusters' residual sums r_c: √(C/(C−1) Σ r_c²) / n.

    With every row its own cluster this is the ordinary std(ddof=1) / √n.
    """
    mean = float(values.mean())
    sums = _cluster_sums(values - mean, clusters)
    if len(sums) < 2:
        return Mean(mean, None)
    return Mean(mean, math.sqrt(len(sums) / (len(sums) - 1) * float((sums ** 2).sum())) / len(values))


@dataclass(frozen=True)
class Interval:
    """The middle 95 % of the resampled figure."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedIntervals:
    """Of the difference candidate − reference (None where no row has a weight), and of the ratio candidate / reference
    (None where the reference's figure is not positive in some resample)."""

    difference: Interval | None
    ratio: Interval | None


def paired_bootstrap(rows: np.ndarray, clusters: np.ndarray, seed: int = 0) -> PairedIntervals:
    """95 % percentile intervals from 10,000 resamples of whole clusters, both models' rows together.

    rows: float64 [n, 3], the reference's value, the candidate's and the weight; a figure is Σ value / Σ weight.
    """
    sums = np.stack([_cluster_sums(column, clusters) for column in rows.T], axis=1)
    count, random = len(sums), np.random.default_rng(seed)
    step = max(1, _BLOCK_COUNTS // count)
    shares = np.full(count, 1 / count)
    drawn = [random.multinomial(count, shares, min(step, RESAMPLES - done)) @ sums
             for done in range(0, RESAMPLES, step)]
    reference, candidate, weight = np.concatenate(drawn).T
    # A resample may miss every row that has a weight (an empty reference text); it says nothing then.
    weighed = weight > 0
    difference = (candidate - reference)[weighed] / weight[weighed]
    ratio = _interval(candidate / reference) if (reference > 0).all() else None
    return PairedIntervals(_interval(difference) if weighed.any() else None, ratio)


def _interval(figures: np.ndarray) -> Interval:
    low, high = np.percentile(figures, [2.5, 97.5])
    return Interval(float(low), float(high))


@dataclass(frozen=True)
class McNemar:
    """lost: right in the reference, wrong now; gained: the other way round; p: two-sided, exact."""

    lost: int
    gained: int
    p: float


def mcnemar(reference_right: np.ndarray, candidate_right: np.ndarray) -> McNemar:
    """Exact test on bool [n] each: p = 2 · P(Bin(lost + gained, ½) ≤ min(lost, gained)), at most 1."""
    lost = int((reference_right & ~candidate_right).sum())
    gained = int((candidate_right & ~reference_right).sum())
    changed = lost + gained
    tail = sum(math.comb(changed, k) for k in range(min(lost, gained) + 1))
    return McNemar(lost, gained, min(1.0, 2 * tail / 2 ** changed))


def smallest_visible_effect(differences: np.ndarray, clusters: np.ndarray) -> float:
    """The change of the mean that n rows would have shown in four cases of five, at a level of 5 %.

    differences: candidate − reference a row, [n]. (z₀.₉₇₅ + z₀.₈) · √(disagreement / n), where disagreement is the mean
    square difference, the share of flips for right and wrong (quantization guide 4.3). Where that is less than n rows
    can rule out, the rate they can rule out with 95 % is taken: 1 − 0.05^(1/n), about 3/n.
    """
    rows = len(differences)
    disagreement = max(float((differences ** 2).mean()), 1 - 0.05 ** (1 / rows))
    clustered = mean_with_error(differences, clusters).se or 0.0
    return _TEST_AND_POWER * max(math.sqrt(disagreement / rows), clustered)


def _cluster_sums(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """[C] sums of values [n] by cluster."""
    _, index = np.unique(clusters, return_inverse=True)
    return np.bincount(index, weights=values)

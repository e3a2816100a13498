"""The figures of a whole comparison, worked out again from the two models' raw logits, without our code for figures."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from vl2.accuracy.compare import CompareOptions, compare
from vl2.accuracy.questions import DataOptions, read_questions
from vl2.accuracy.record import OpenBundle, RecordOptions
from vl2.accuracy.walk import Walk, WalkOptions
from vl2.runtime.engine import Context

WALK = WalkOptions(max_new_tokens=8)


def seen_by_both(reference: OpenBundle, candidate: OpenBundle, path: Path) -> list[tuple]:
    """(image, token that followed, the reference's logits, the candidate's) of every answer position."""
    found = []
    for question in read_questions(path, reference.model.engine.processor, DataOptions()).questions:
        sides: tuple[list, list] = ([], [])
        reply = Walk(Context(reference.model.engine), reference.model, question.conversation(), WALK).greedy(
            sides[0].append)
        Walk(Context(candidate.model.engine), candidate.model, question.conversation(), WALK).along(
            reply, sides[1].append)
        found += [(question.image, one.target, one.logits, other.logits) for one, other in zip(*sides, strict=True)]
    return found


def probabilities(logits: np.ndarray) -> list[float]:
    exact = [math.exp(float(x) - float(logits.max())) for x in logits]
    return [x / math.fsum(exact) for x in exact]


def percentile(values: list[float], share: float) -> float:
    """Between the two neighbours in order, in proportion."""
    ordered, place = sorted(values), share / 100 * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def clustered_error(values: list[float], images: list[str]) -> float:
    """√(C / (C − 1) Σ (Σ of a cluster's residuals)²) / n."""
    mean = math.fsum(values) / len(values)
    rows = sorted(zip(images, values, strict=True))
    sums = [math.fsum(value - mean for _, value in rows) for _, rows in groupby(rows, key=lambda row: row[0])]
    return math.sqrt(len(sums) / (len(sums) - 1) * math.fsum(x * x for x in sums)) / len(values)


def test_every_figure_of_the_logits_equals_brute_force(
    reference: OpenBundle, candidate: OpenBundle, questions_file: Path
) -> None:
    options = CompareOptions(record=RecordOptions(WALK, top=640))
    found = compare(reference.folder, candidate.folder, questions_file, options)["logits"]["answer"]
    images, klds, same, deltas, logs = [], [], [], [], []
    for image, target, a, b in seen_by_both(reference, candidate, questions_file):
        p, q = probabilities(a), probabilities(b)
        images.append(image)
        klds.append(math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
        same.append(100.0 * (p.index(max(p)) == q.index(max(q))))
        deltas.append(q[target] - p[target])
        logs.append((math.log(p[target]), math.log(q[target])))
    count = len(klds)
    assert found["positions"] == count and found["images"] == len(set(images)) == 4
    kld = found["kld"]
    assert kld["mean"] == pytest.approx(math.fsum(klds) / count, rel=1e-4)
    assert kld["se"] == pytest.approx(clustered_error(klds, images), rel=1e-4)
    for name, share in {"median": 50, "p90": 90, "p99": 99, "p99_9": 99.9, "max": 100}.items():
        assert kld[name] == pytest.approx(percentile(klds, share), rel=1e-4), name
    assert found["same_top1_percent"]["mean"] == pytest.approx(math.fsum(same) / count)
    assert found["same_top1_percent"]["se"] == pytest.approx(clustered_error(same, images))
    assert found["rms_delta_p_percent"] == pytest.approx(100 * math.sqrt(math.fsum(x * x for x in deltas) / count),
                                                         rel=1e-4)
    perplexities = [math.exp(-math.fsum(pair[side] for pair in logs) / count) for side in (0, 1)]
    found = found["perplexity"]
    assert [found["reference"], found["candidate"]] == pytest.approx(perplexities, rel=1e-5)
    assert found["ratio"] == pytest.approx(perplexities[1] / perplexities[0], rel=1e-5)
    paired = clustered_error([p - q for p, q in logs], images)
    assert found["ln_ratio_se"] == pytest.approx(paired, rel=1e-4)
    assert found["ratio_se"] == pytest.approx(found["ratio"] * paired, rel=1e-4), "to first order"

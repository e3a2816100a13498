"""The figures of a comparison, as one JSON object. Every share is in per cent, every KLD in nats."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vl2 import __version__
from vl2.accuracy.answers import answer_figures
from vl2.accuracy.bounds import Bounds, check_bounds
from vl2.accuracy.comparison import Comparison, Positions
from vl2.accuracy.statistics import mean_with_error
from vl2.accuracy.tasks import task_figures
from vl2.accuracy.walk import KINDS
from vl2.accuracy.worst import worst_questions
from vl2.json_file import to_json

SCHEMA_VERSION = 1
_PERCENTILES = {"median": 50, "p90": 90, "p99": 99, "p99_9": 99.9}


@dataclass(frozen=True)
class Joined:
    """What a report takes in as it is. layers: the report of `vl2 layers` on the same checkpoints; floor: of
    `floor_figures`."""

    layers: dict[str, Any] | None = None
    floor: dict[str, Any] | None = None


def floor_figures(comparison: Comparison) -> dict[str, Any]:
    """What the reference's own weights lose when they are stored as another bundle has them."""
    return {"bundle": asdict(comparison.candidate),
            "logits": {name: logit_figures(comparison.positions, kind) for name, kind in KINDS.items()}}


def summarise(comparison: Comparison, bounds: Bounds, joined: Joined = Joined()) -> dict[str, Any]:
    """The report: logit level by kind of position, tasks, answers, and whether the bounds hold."""
    recording, data = comparison.recording, comparison.data
    tasks, overall = task_figures(comparison)
    logits = {name: logit_figures(comparison.positions, kind) for name, kind in KINDS.items()}
    report = {
        "schema_version": SCHEMA_VERSION, "vl2_version": __version__,
        "reference": {**asdict(recording.facts.bundle), "recording_vl2_version": recording.facts.vl2_version},
        "candidate": asdict(comparison.candidate),
        "data": {"path": data.path, "format": data.format, "sha256": data.sha256, "rows": data.rows,
                 "questions": len(data.questions), "images": len({question.image for question in data.questions}),
                 "bad_rows": [str(row) for row in data.bad_rows], "ignored": list(data.ignored)},
        "options": {"max_new_tokens": recording.facts.max_new_tokens, "top": recording.facts.top,
                    "exact": recording.facts.top >= recording.facts.bundle.vocab_size},
        "logits": logits,
        "not_measured": _not_measured(logits, joined.layers),
        "tasks": tasks, "overall": overall, "answers": answer_figures(comparison),
        "worst_questions": worst_questions(comparison), "layers": joined.layers, "floor": joined.floor,
        "seconds": round(comparison.seconds, 1),
    }
    return {**report, "bounds": to_json(check_bounds(report, bounds))}


def _not_measured(logits: dict[str, Any], layers: dict[str, Any] | None) -> list[str]:
    missing = [] if layers is not None else [
        "image positions, which a bundle's decoder gives no logits of, layers and router choices: `vl2 layers` does, "
        "between the checkpoints, and --layers takes its file"]
    return missing if logits["text"] else ["the prompt's text positions: recorded without --prompt-text", *missing]


def logit_figures(positions: Positions, kind: int) -> dict[str, Any] | None:
    """Divergence, agreement and perplexity over the positions of one kind; None without any.

    Standard errors are clustered by image. Perplexity is that of the reference's own greedy answer (kind answer) or of
    the prompt (kind text).
    """
    chosen = positions.kind == kind
    if not chosen.any():
        return None
    clusters = positions.cluster[chosen]
    found = divergence_figures(positions.kld[chosen], positions.same_top1[chosen], clusters)
    found["kld"]["mean_at_most"] = float(positions.kld_most[chosen].mean())
    return found | probability_figures(positions.log_p[chosen], positions.log_q[chosen], clusters)


def divergence_figures(kld: np.ndarray, same_top1: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """Of positions [n], at least one: KLD in nats, bool whether both models choose the same token, int image."""
    return {
        "positions": len(kld), "images": len(np.unique(clusters)),
        "kld": {**asdict(mean_with_error(kld, clusters)),
                **{name: float(np.percentile(kld, share)) for name, share in _PERCENTILES.items()},
                "max": float(kld.max())},
        "same_top1_percent": asdict(mean_with_error(100.0 * same_top1, clusters)),
    }


def probability_figures(log_p: np.ndarray, log_q: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """What happened to the tokens that followed: log_p, log_q: [n], their log-probabilities in both models."""
    delta, ratio = np.exp(log_q) - np.exp(log_p), mean_with_error(log_p - log_q, clusters)
    return {
        "rms_delta_p_percent": 100.0 * math.sqrt(float((delta ** 2).mean())),
        "mean_delta_p_percent": 100.0 * float(delta.mean()),
        "perplexity": {"reference": math.exp(-float(log_p.mean())), "candidate": math.exp(-float(log_q.mean())),
                       "ln_ratio": ratio.mean, "ln_ratio_se": ratio.se, "ratio": math.exp(ratio.mean),
                       "ratio_se": None if ratio.se is None else math.exp(ratio.mean) * ratio.se},
    }

"""The last norm and lm_head of both models: their distributions at every position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vl2.accuracy.summary import divergence_figures, probability_figures
from vl2.calib.statistics import ROWS_AT_ONCE
from vl2.layerwise.checkpoints import Pair
from vl2.layerwise.large import compare_in_pieces, read_in_pieces
from vl2.layerwise.ledger import Ledger
from vl2.layerwise.parts import States, load_pair, run_part
from vl2.model.norm import RMSNorm

LOGIT_KINDS = ("text", "image", "answer")
LOGITS = "logits"
_ANSWER = LOGIT_KINDS.index("answer")
_PARAMETER = "language.lm_head.weight"  # named alike in the checkpoint
LOGITS_AT_ONCE = 1 << 22  # of a model in float64: 34 MB


@dataclass(frozen=True)
class Distances:
    """Of every position: kld float64 nats, same_top1 bool, and of an answer's next token log_p and log_q (0 elsewhere),
    each [tokens]."""

    kld: np.ndarray
    same_top1: np.ndarray
    log_p: np.ndarray
    log_q: np.ndarray


def run_head(pair: Pair, states: States, following: Tensor, told: tuple[Ledger, Callable[[float], None]]) -> Distances:
    """States behind the last layer to distances. following: int64 [tokens], −1 for none; told: the ledger, and what is
    called with the share that is done."""
    ledger, advance = told
    config, count = pair.config.language_config, len(following)
    norm = load_pair(pair, lambda: RMSNorm(config.hidden_size, config.rms_norm_eps), "language.norm.", ledger)
    slices = (slice(start, start + ROWS_AT_ONCE) for start in range(0, count, ROWS_AT_ONCE))
    states = run_part(norm, states, slices, ("norm", False), ledger)
    heads = _heads(pair, ledger)
    step, parts = max(1, LOGITS_AT_ONCE // config.vocab_size), []
    for start in range(0, count, step):
        rows = slice(start, start + step)
        parts.append(_distances(heads, states, rows, following[rows], ledger))
        advance(len(following[rows]) / count)
    return Distances(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _heads(pair: Pair, ledger: Ledger) -> tuple[Tensor, Tensor]:
    """Both matrices [V, H]; the same object where they are equal."""
    if compare_in_pieces(pair, _PARAMETER, ledger):
        shared = read_in_pieces(pair.reference, _PARAMETER)
        return shared, shared
    return read_in_pieces(pair.reference, _PARAMETER), read_in_pieces(pair.quantized, _PARAMETER)


def _distances(heads: tuple[Tensor, Tensor], states: States, rows: slice, following: Tensor, ledger: Ledger
               ) -> tuple[np.ndarray, ...]:
    """The columns of `Distances` for some rows."""
    y, modality = states.reference[rows] @ heads[0].T, states.modality[rows]
    if heads[1] is not heads[0]:
        error = states.reference[rows] @ heads[1].T - y
        ledger.sums("outputs", _PARAMETER).add(y, error, modality)
    is_same = states.same and heads[1] is heads[0]
    z = y if is_same else states.quantized[rows] @ heads[1].T
    ledger.sums("stream", LOGITS).add(y, z - y, modality)
    log_p = y.double().log_softmax(dim=1)
    log_q = log_p if is_same else z.double().log_softmax(dim=1)
    kld = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    chosen = following.clamp_min(0)[:, None]
    columns = (kld, y.argmax(dim=1) == z.argmax(dim=1),
               *(torch.where(following >= 0, log.gather(1, chosen)[:, 0], 0.0) for log in (log_p, log_q)))
    return tuple(column.numpy() for column in columns)


def logit_figures(distances: Distances, kinds: np.ndarray, clusters: np.ndarray) -> dict[str, dict[str, Any] | None]:
    """Divergence and agreement at the prompt's text, at image and at answer positions; at the last also what the
    answers' tokens lost. kinds: int [tokens], index into LOGIT_KINDS; clusters: int [tokens], equal on one image."""
    found: dict[str, dict[str, Any] | None] = {}
    for kind, name in enumerate(LOGIT_KINDS):
        chosen = kinds == kind
        found[name] = None
        if chosen.any():
            found[name] = divergence_figures(distances.kld[chosen], distances.same_top1[chosen], clusters[chosen])
        if chosen.any() and kind == _ANSWER:
            found[name] |= probability_figures(distances.log_p[chosen], distances.log_q[chosen], clusters[chosen])
    return found


def logit_kinds(modality: np.ndarray, following: np.ndarray) -> np.ndarray:
    """int [tokens]: an answer's token comes next, or else text or image by the position itself."""
    return np.where(following >= 0, _ANSWER, modality).astype(np.int64)

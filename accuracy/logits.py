"""What of a position's logits is kept, and how far another model's logits are from it.

Of a large vocabulary the `top` likeliest tokens are kept with their log-probabilities and the probability of all others
together: 8 kB a position for 1,024 tokens, where float16 logits of DeepSeek-VL2's 129,280 take 258 kB. With `top` at
least the vocabulary everything is kept and the divergence is exact. Otherwise two numbers enclose it:

* `kld` takes the other tokens as one symbol. Merging symbols never raises the divergence (log-sum inequality), so this
  is a lower bound.
* `kld_most` is the largest divergence that any reference with the kept probabilities could have: what the others add is
  convex in their probabilities, so it is largest at a corner, where the least likely tokens of the other model hold as
  much as a token that was not kept can hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vl2.errors import VL2Error


@dataclass(frozen=True)
class Kept:
    """A position of the reference. ids: int32 [k] ascending, None for all; log_probs: float32 [k]; log_rest: float32
    log-probability of all others, −inf for none; top1: the likeliest token."""

    ids: np.ndarray | None
    log_probs: np.ndarray
    log_rest: np.float32
    top1: int


@dataclass(frozen=True)
class Divergence:
    """KLD in nats, its upper bound, and whether both models' likeliest token is the same."""

    kld: float
    kld_most: float
    same_top1: bool


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [V] of float32 [V]. Raises VL2Error for logits that are not finite, of which nothing can be said."""
    if not np.isfinite(logits).all():
        raise VL2Error(f"{np.count_nonzero(~np.isfinite(logits))} of {len(logits)} logits are not finite",
                       "activations overflowed or the weights are broken; try the bundle with `vl2 run`")
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted - np.log(np.exp(shifted).sum())


def keep(logits: np.ndarray, top: int) -> Kept:
    """The `top` likeliest tokens of logits float32 [V], or all of them."""
    log_probs, top1 = log_softmax(logits), int(np.argmax(logits))
    if top >= len(logits):
        return Kept(None, log_probs.astype(np.float32), np.float32(-np.inf), top1)
    ids = np.sort(np.argpartition(-log_probs, top - 1)[:top]).astype(np.int32)
    return Kept(ids, log_probs[ids].astype(np.float32), _log_rest(log_probs, ids), top1)


def divergence(reference: Kept, logits: np.ndarray) -> Divergence:
    """How far the distribution of logits float32 [V] is from the reference's, Σ p (log p − log q)."""
    log_q, same = log_softmax(logits), int(np.argmax(logits)) == reference.top1
    if reference.ids is None:
        kld = _merged_kld(reference.log_probs, log_q.astype(np.float32))
        return Divergence(kld, kld, same)
    ids = reference.ids
    kept_q, rest_q = log_q[ids].astype(np.float32), _log_rest(log_q, ids)
    kld = _merged_kld(np.append(reference.log_probs, reference.log_rest), np.append(kept_q, rest_q))
    others = np.delete(log_q, ids)
    return Divergence(kld, kld + _most_within_rest(reference, others, float(rest_q)), same)


def _log_rest(log_probs: np.ndarray, ids: np.ndarray) -> np.float32:
    """log of the probability of all tokens but `ids`, summed directly: 1 − Σ would cancel."""
    others = np.delete(log_probs, ids)
    highest = others.max()
    return np.float32(highest + np.log(np.exp(others - highest).sum()))


def _merged_kld(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """Of two lists of log-probabilities that went through the same rounding, so that equal models give exactly 0.

    Both are normalised again: rounding to float32 alone would leave a first-order error of 1e-7, of either sign.
    """
    log_p, log_q = (x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum()) for x in (log_p, log_q))
    p = np.exp(log_p)
    used = p > 0
    return float((p[used] * (log_p[used] - log_q[used])).sum())


def _most_within_rest(reference: Kept, others_q: np.ndarray, rest_q: float) -> float:
    """The most that Σ p log(p/q) over the tokens not kept can exceed the same for their sum.

    others_q: float64 [V − k] log-probabilities of the other model. None of the reference's exceeds the least kept one.
    """
    rest_p = float(reference.log_rest)
    if rest_p == -np.inf:
        return 0.0
    highest = float(reference.log_probs.min())
    full = min(int(np.exp(rest_p - highest)), len(others_q))
    least = np.sort(np.partition(others_q, min(full, len(others_q) - 1))[:full + 1])
    left = max(np.exp(rest_p) - full * np.exp(highest), 0.0)
    most = np.exp(highest) * (full * highest - least[:full].sum())
    if left > 0 and full < len(others_q):
        most += left * (np.log(left) - least[full])
    return max(float(most - np.exp(rest_p) * (rest_p - rest_q)), 0.0)

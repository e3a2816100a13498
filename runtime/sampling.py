"""Choosing the next token: penalties, the mask of a constraint, then temperature, then top-p."""

from __future__ import annotations

import numpy as np

from vl2.runtime.options import GenerationOptions

# Probabilities below this share of the largest are looked at only when the others do not reach top_p.
_UNLIKELY = 1e-4


class Sampler:
    """Draws tokens for one answer. Logits are float32 [V] and are changed in place."""

    def __init__(self, options: GenerationOptions, prompt_ids: np.ndarray, vocab_size: int):
        self._options = options
        # As it divides: what is less than the smallest float32 is greedy too, not a division by 0.
        self._temperature = np.float32(options.temperature)
        self._random = np.random.default_rng(options.seed)
        self._seen = np.zeros(vocab_size, bool)
        self._seen[prompt_ids] = True
        self._drawn: dict[int, int] = {}

    def draw(self, logits: np.ndarray, allowed: np.ndarray | None = None) -> int:
        """The id of the next token, one of `allowed` bool [V], which from then on counts as seen."""
        options = self._options
        if options.repetition_penalty != 1.0:
            penalise_repetition(logits, self._seen, options.repetition_penalty)
        if self._drawn and (options.frequency_penalty or options.presence_penalty):
            penalise_counts(logits, self._drawn, options.frequency_penalty, options.presence_penalty)
        if allowed is not None:
            logits[~allowed] = -np.inf
        if self._temperature == 0:
            token = int(np.argmax(logits))
        else:
            token = self._sample(logits)
        self._seen[token] = True
        self._drawn[token] = self._drawn.get(token, 0) + 1
        return token

    def _sample(self, logits: np.ndarray) -> int:
        with np.errstate(over="ignore"):  # to -inf, which is no probability
            tempered = (logits - logits.max()) / self._temperature
        weights = np.exp(tempered, dtype=np.float32)
        tokens, shares = nucleus(weights.astype(np.float64) / weights.sum(dtype=np.float64), self._options.top_p)
        cumulative = np.cumsum(shares)
        position = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        if position == len(tokens):  # the product was rounded up to the whole
            position = int(np.flatnonzero(shares)[-1])
        return int(tokens[position])


def penalise_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> None:
    """Divides the positive logits of seen tokens by the penalty and multiplies the others by it, in place.

    logits: float32 [V]; seen: bool [V], prompt and answer. Source: spec 11.
    """
    ids = np.flatnonzero(seen)
    values = logits[ids]
    factor = np.float32(penalty)
    logits[ids] = np.where(values > 0, values / factor, values * factor)


def penalise_counts(logits: np.ndarray, drawn: dict[int, int], frequency: float, presence: float) -> None:
    """Takes `frequency` times its count and `presence` once from the logit of each drawn token, in place.

    logits: float32 [V]; drawn: how often each id is in the answer. Source: OpenAI's API reference.
    """
    ids = np.fromiter(drawn.keys(), np.int64, len(drawn))
    counts = np.fromiter(drawn.values(), np.float32, len(drawn))
    logits[ids] -= counts * np.float32(frequency) + np.float32(presence)


def nucleus(probabilities: np.ndarray, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """(ids, probabilities) of the smallest set of likeliest tokens that reaches `top_p`, likeliest first.

    With `top_p` 1 these are all tokens, in their own order.
    """
    if top_p == 1.0:
        return np.arange(len(probabilities)), probabilities
    likely = np.flatnonzero(probabilities >= probabilities.max() * _UNLIKELY)
    if probabilities[likely].sum() < top_p:
        likely = np.flatnonzero(probabilities)
    ids = likely[np.argsort(-probabilities[likely], kind="stable")]
    shares = probabilities[ids]
    before = np.cumsum(shares) - shares
    kept = max(1, int(np.searchsorted(before, top_p, side="left")))
    return ids[:kept], shares[:kept]

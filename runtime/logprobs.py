"""Log-probabilities of answer tokens in the model's own distribution: before temperature, penalties, constraints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vl2.runtime.detokenize import TokenBytes


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer. logprob: natural logarithm; top: the likeliest tokens at its place, likeliest first, each
    (id, bytes, logprob). text: bytes, since a token may be a part of a character; end and padding tokens have none."""

    token_id: int
    text: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: bytes as text, where U+FFFD stands for what is no whole character, and as a list of numbers."""
        top = [_entry(*candidate) for candidate in self.top]
        return {**_entry(self.token_id, self.text, self.logprob), "top": top}


def _entry(token_id: int, text: bytes, logprob: float) -> dict[str, Any]:
    return {"token_id": token_id, "text": text.decode("utf-8", "replace"), "bytes": list(text), "logprob": logprob}


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """float64 [V] natural logarithms of softmax over float32 [V] logits."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return wide - np.log(np.exp(wide).sum())


def describe_token(logprobs: np.ndarray, token: int, top: int, token_bytes: TokenBytes) -> TokenLogprob:
    """The entry of `token` with the `top` likeliest of float64 [V]; equal ones in the order of their ids."""
    count = min(top, len(logprobs))
    # A selection first: sorting a vocabulary of 100,000 takes longer than a decode step's other NumPy work.
    least = np.partition(logprobs, -count)[-count] if count else np.inf
    candidates = np.flatnonzero(logprobs >= least)
    best = candidates[np.argsort(-logprobs[candidates], kind="stable")][:count]
    return TokenLogprob(token, token_bytes[token], float(logprobs[token]),
                        tuple((int(other), token_bytes[int(other)], float(logprobs[other])) for other in best))

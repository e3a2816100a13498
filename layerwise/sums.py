"""How far one model's numbers are from the other's, summed up position by position, text and image apart.

Of each position's vector y (reference) and y + e: signal Σ y², noise Σ e² and the cosine of the two vectors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("text", "image")
_COLUMNS = 4  # positions, signal, noise, cosines
_AT_ONCE = 1 << 22  # numbers of a matrix in float64, 32 MB


class Sums:
    """float64 [2, 4]: positions, Σ signal, Σ noise, Σ cosine, for text and for image positions."""

    def __init__(self, values: list[list[float]] | None = None):
        self.values = np.zeros((len(KINDS), _COLUMNS)) if values is None else np.array(values, np.float64)

    def add(self, y: Tensor, error: Tensor, modality: Tensor) -> None:
        """y: the reference's [..., K]; error: the other's − y; modality: uint8 [n] of the positions."""
        y, error = y.flatten(0, -2), error.flatten(0, -2)
        signal, noise = y.square().sum(-1).double(), error.square().sum(-1).double()
        along = signal + (y * error).sum(-1).double()
        other = (y + error).square().sum(-1).double()
        columns = torch.stack((torch.ones_like(signal), signal, noise, _cosine(along, signal, other)), dim=1).numpy()
        for kind in range(len(KINDS)):
            self.values[kind] += columns[modality.numpy() == kind].sum(axis=0)

    def __iadd__(self, other: Sums) -> Sums:
        self.values += other.values
        return self

    def figures(self) -> dict[str, dict[str, Any] | None]:
        """`figure` of all positions, of text and of image positions; None for a kind that does not occur."""
        named = {"all": self.values.sum(axis=0), **dict(zip(KINDS, self.values, strict=True))}
        return {name: None if row[0] == 0 else {"positions": int(row[0]), **figure(row[1], row[2]),
                                                "cosine": float(row[3] / row[0])} for name, row in named.items()}


def _cosine(along: Tensor, signal: Tensor, other: Tensor) -> Tensor:
    """along / √(signal · other), at most 1; 1 where both vectors are zero, 0 where one is."""
    length = (signal * other).sqrt()
    both_zero = ((signal == 0) & (other == 0)).double()
    return torch.where(length > 0, along / length.clamp_min(torch.finfo(torch.float64).tiny), both_zero).clamp(-1, 1)


def figure(signal: float, noise: float) -> dict[str, float | None]:
    """`error` = noise / signal and `sqnr_db` = −10 · log10 of it.

    JSON has no infinity: without noise the error is 0 and sqnr_db None (∞); noise without signal has both None (−∞).
    """
    if noise == 0:
        return {"error": 0.0, "sqnr_db": None}
    if signal == 0:
        return {"error": None, "sqnr_db": None}
    error = float(noise / signal)
    return {"error": error, "sqnr_db": -10 * math.log10(error)}


class WeightSums:
    """Of a matrix that comes in pieces: Σ W², Σ (Ŵ − W)², Σ W·Ŵ, Σ Ŵ²."""

    def __init__(self) -> None:
        self.signal = self.noise = self.along = self.other = 0.0

    def add(self, weight: Tensor, stored: Tensor) -> None:
        """The same piece of both, float32."""
        for mine, theirs in zip(weight.flatten().split(_AT_ONCE), stored.flatten().split(_AT_ONCE), strict=True):
            w, v = mine.double(), theirs.double()
            self.signal += float(w.square().sum())
            self.noise += float((v - w).square().sum())
            self.along += float((w * v).sum())
            self.other += float(v.square().sum())

    def figure(self) -> dict[str, float | None]:
        """error, sqnr_db and the cosine of the two matrices as vectors."""
        cosine = _cosine(*(torch.tensor(x, dtype=torch.float64) for x in (self.along, self.signal, self.other)))
        return {**figure(self.signal, self.noise), "cosine": float(cosine)}

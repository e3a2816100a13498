"""Matrices as large as the vocabulary, compared and read in pieces: one dequantized whole takes twice its size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vl2.layerwise.checkpoints import Pair, StoredWeights
from vl2.layerwise.ledger import Ledger
from vl2.layerwise.sums import WeightSums

_ROWS_AT_ONCE = 8192  # 42 MB of the published Tiny's token table


def compare_in_pieces(pair: Pair, name: str, ledger: Ledger) -> bool:
    """Puts the matrix `name` of the checkpoint into the ledger; whether it is the same in both."""
    sums, same = WeightSums(), pair.quantized.form_of(name) is None
    for start, length in _pieces(pair.reference, name):
        mine, theirs = (weights.rows(name, start, length) for weights in (pair.reference, pair.quantized))
        sums.add(mine, theirs)
        same = same and torch.equal(mine, theirs)
    if same:
        ledger.unchanged.add(name)
    else:
        ledger.weights[name] = sums.figure()
    return same


def read_in_pieces(weights: StoredWeights, name: str) -> Tensor:
    """The whole matrix, float32."""
    rows, columns = weights.shape_of(name)
    whole = torch.empty(rows, columns)
    for start, length in _pieces(weights, name):
        whole[start:start + length] = weights.rows(name, start, length)
    return whole


def _pieces(weights: StoredWeights, name: str) -> Iterator[tuple[int, int]]:
    """First row and number of rows."""
    rows, _ = weights.shape_of(name)
    for start in range(0, rows, _ROWS_AT_ONCE):
        yield start, min(_ROWS_AT_ONCE, rows - start)

"""Matrices in pieces are the matrices."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import GOLDENS
from vl2.layerwise import large
from vl2.layerwise.checkpoints import open_pair
from vl2.layerwise.ledger import Ledger
from vl2.layerwise.sums import WeightSums

TINY = GOLDENS / "tiny-mini"


@pytest.mark.parametrize("name", ["language.lm_head.weight", "language.model.embed_tokens.weight"])
def test_pieces_make_the_whole(quantized_of, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(large, "_ROWS_AT_ONCE", 96)  # 640 rows: six pieces and a shorter one
    pair, ledger = open_pair(TINY, quantized_of(TINY, "int4")), Ledger()
    mine, theirs = (weights.read(name) for weights in (pair.reference, pair.quantized))
    assert torch.equal(large.read_in_pieces(pair.reference, name), mine)
    assert torch.equal(large.read_in_pieces(pair.quantized, name), theirs)
    assert not large.compare_in_pieces(pair, name, ledger)
    whole = WeightSums()
    whole.add(mine, theirs)
    assert ledger.weights[name] == pytest.approx(whole.figure())
    assert large.compare_in_pieces(open_pair(TINY, TINY), name, ledger) and name in ledger.unchanged

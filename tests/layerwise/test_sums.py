"""Sums over positions: against a loop, and where nothing is lost or nothing was there."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vl2.accuracy.layers import decibels, layer_tables
from vl2.layerwise.ledger import Ledger
from vl2.layerwise.sums import Sums, WeightSums, figure


def test_sums_equal_a_loop_over_positions_and_pieces() -> None:
    generator = torch.Generator().manual_seed(0)
    y, error = torch.randn(9, 5, generator=generator), 0.1 * torch.randn(9, 5, generator=generator)
    modality = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1, 0], dtype=torch.uint8)
    sums = Sums()
    for rows in (slice(0, 4), slice(4, 9)):
        sums.add(y[rows], error[rows], modality[rows])
    for name, chosen in {"all": range(9), "text": (0, 3, 4, 8), "image": (1, 2, 5, 6, 7)}.items():
        a, b = (x.double().numpy()[list(chosen)] for x in (y, y + error))
        found = sums.figures()[name]
        assert found["positions"] == len(chosen)
        assert found["error"] == pytest.approx(((b - a) ** 2).sum() / (a**2).sum(), rel=1e-5)
        cosines = [x @ z / np.linalg.norm(x) / np.linalg.norm(z) for x, z in zip(a, b, strict=True)]
        assert found["cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)


def test_zero_vectors_have_a_cosine_and_json_has_no_infinity() -> None:
    sums = Sums()
    sums.add(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]]),
             torch.zeros(2, dtype=torch.uint8))
    found = sums.figures()
    assert found["text"] == {"positions": 2, "error": None, "sqnr_db": None, "cosine": 0.5} and found["image"] is None
    weights = WeightSums()
    weights.add(torch.zeros(2, 2), torch.zeros(2, 2))
    assert weights.figure() == {"error": 0.0, "sqnr_db": None, "cosine": 1.0}
    json.dumps([found, weights.figure()], allow_nan=False)


def test_decibels_tell_infinity_apart() -> None:
    assert [decibels(figure(*pair)) for pair in ((1, 0), (0, 0), (0, 1), (100, 1))] == ["∞", "∞", "−∞", "20.0"]
    assert decibels(None) == "–"


def test_noise_on_nothing_is_worse_than_any_noise_on_something() -> None:
    def side(signal: float, noise: float) -> dict:
        figures = {"positions": 1, **figure(signal, noise), "cosine": 0.5}
        return {"all": figures, "text": figures, "image": None}

    blocks = [{"block": name, "own": side(*pair), "stream": side(*pair)}
              for name, pair in {"fine": (1, 1e-3), "dead": (0, 1), "bad": (1, 0.5), "same": (1, 0)}.items()]
    report = {"blocks": blocks, "routers": [], "matrices": [], "logits": {}, "unchanged_tensors": 0, "seconds": 1,
              "vl2_version": "0", "scales_taken_out": False, "reference": {"name": "a"},
              "quantized": {"name": "b", "recipe": None, "method": None, "calibration": None},
              "data": {"path": None, "format": "x", "sha256": "", "rows": 1, "conversations": 1, "text_positions": 1,
                       "image_positions": 0, "bad_rows": []}}
    table = layer_tables(report)[0]
    assert [row[0] for row in table.rows] == ["dead", "bad", "fine"] and "1 other block" in table.note


def test_a_ledger_survives_as_json_number_for_number() -> None:
    ledger = Ledger({"w": {"error": 0.1, "sqnr_db": 10.0, "cosine": 0.9}}, {"b", "a"})
    ledger.sums("own", "x").add(torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 1], dtype=torch.uint8))
    ledger.add_router(2, np.array([[3, 1, 0], [4, 2, 1]]))
    text = json.dumps(ledger.to_json())
    assert json.dumps(Ledger.from_json(json.loads(text)).to_json()) == text

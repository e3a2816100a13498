"""AWQ's folds are taken out before matrices are compared: what remains is the codes' own error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import GOLDENS
from vl2.accuracy.layers import layer_tables
from vl2.calib.data import CalibrationData, DataOptions, read_data
from vl2.calib.embed import embed_calibration
from vl2.calib.stream import StreamOptions
from vl2.cli.calibrated import CalibratedJob, quantize_calibrated
from vl2.layerwise.checkpoints import open_pair
from vl2.layerwise.decoder import run_layer
from vl2.layerwise.ledger import Ledger
from vl2.layerwise.measure import measure_layers
from vl2.layerwise.parts import States
from vl2.prompt import Processor
from vl2.quant.quantizer import QuantizeOptions


@pytest.fixture(scope="module", params=["tiny-mini", "small-mini"])
def mini(request: pytest.FixtureRequest) -> Path:
    """Plain and latent attention, which fold in different places."""
    return GOLDENS / request.param


def texts(mini: Path, folder: Path) -> CalibrationData:
    """Four short conversations without an image."""
    rows = [{"question": f"What is {a} and {a + 1}?", "answer": f"It is {2 * a + 1}."} for a in range(4)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_data(folder / "texts.jsonl", Processor.from_folder(mini), DataOptions())


@pytest.fixture(scope="module")
def folded(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """INT8 by AWQ alone: its own error is below 1 %, its scales are not."""
    root = tmp_path_factory.mktemp("folded")
    embed_calibration(mini, texts(mini, root), root / "set")
    options = QuantizeOptions("int8", method="awq")
    return quantize_calibrated(CalibratedJob(mini, root / "set", root / "out", options, StreamOptions()))


def test_every_matrix_of_a_folded_checkpoint_is_as_near_as_its_codes(
    mini: Path, folded: Path, tmp_path: Path
) -> None:
    pair = open_pair(mini, folded)
    assert pair.folded
    norm = "language.model.layers.1.post_attention_layernorm.weight"
    assert not torch.allclose(pair.reference.read(norm), pair.quantized.read(norm), rtol=0.05), "nothing was folded"
    report = measure_layers(mini, folded, texts(mini, tmp_path))
    assert report["scales_taken_out"]
    assert report["logits"]["image"] is None and report["routers"][0]["image"] is None, "no image was shown"
    assert "tower and projector were not measured" in layer_tables(report)[-1].note
    packed = [row for row in report["matrices"] if row["form"] is not None]
    assert len(packed) > 100
    # A step of 1/127.5 of the largest weight of a group of at most 128: noise below −30 dB for any weights.
    assert min(row["weights"]["sqnr_db"] for row in packed) > 30
    assert min(row["output"]["all"]["sqnr_db"] for row in packed if row["output"] and row["output"]["all"]) > 30
    floats = [row for row in report["matrices"] if row["form"] is None]
    assert all(row["module"] == "router" and row["weights"]["sqnr_db"] > 120 for row in floats), "folded exactly"


def test_without_taking_the_folds_out_the_same_matrices_look_lost(mini: Path, folded: Path) -> None:
    pair = replace(open_pair(mini, folded), folded=False)
    hidden = torch.randn(8, pair.config.language_config.hidden_size)
    ledger = Ledger()
    with torch.no_grad():
        run_layer(pair, 0, States(hidden, hidden, torch.zeros(8, dtype=torch.uint8)), [(0, 8)],
                  (ledger, lambda step, share: None))
    assert min(figure["sqnr_db"] for figure in ledger.weights.values()) < 20

"""The layer report as one JSON object: what `vl2.accuracy.layers` reads and shows without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vl2 import __version__
from vl2.accuracy.layers import MADE_BY, SCHEMA_VERSION, rank
from vl2.calib.data import CalibrationData
from vl2.json_file import read_json
from vl2.layerwise.checkpoints import Pair
from vl2.layerwise.ledger import Ledger
from vl2.layerwise.sums import KINDS
from vl2.modules import module_of
from vl2.quantization import DESCRIPTION_NAME, WEIGHT


def to_report(pair: Pair, made_from: tuple[list[dict[str, Any]], CalibrationData], ledger: Ledger,
              logits: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """made_from: the sources of both checkpoints (name, files with sha256), and the data."""
    (reference, quantized), data = made_from
    return {
        "schema_version": SCHEMA_VERSION, "vl2_version": __version__,
        "reference": reference, "quantized": {**quantized, **_description(pair.quantized.folder)},
        "data": _data(data), "scales_taken_out": pair.folded,
        "blocks": _blocks(ledger), "routers": _routers(ledger), "logits": dict(logits),
        "matrices": _matrices(pair, ledger), "unchanged_tensors": len(ledger.unchanged), "seconds": seconds,
    }


def _description(folder: Path) -> dict[str, Any]:
    """Recipe, method and calibration of a checkpoint that vl2 quantized; None each of any other."""
    path = folder / DESCRIPTION_NAME
    facts = read_json(path) if path.is_file() else {}
    return {name: facts.get(name) for name in MADE_BY}


def _data(data: CalibrationData) -> dict[str, Any]:
    images = sum(sample.image_tokens for sample in data.samples)
    return {"path": data.path, "format": data.format, "sha256": data.sha256, "rows": data.rows,
            "conversations": len(data.samples), "image_positions": images,
            "text_positions": sum(sample.tokens for sample in data.samples) - images,
            "bad_rows": [str(row) for row in data.bad_rows]}


def _blocks(ledger: Ledger) -> list[dict[str, Any]]:
    """In the order in which they run."""
    return [{"block": name, "own": ledger.own[name].figures() if name in ledger.own else None,
             "stream": sums.figures()} for name, sums in ledger.stream.items()]


def _routers(ledger: Ledger) -> list[dict[str, Any]]:
    rows = []
    for l, counts in sorted(ledger.routers.items()):
        named = {"all": counts.sum(axis=0), **dict(zip(KINDS, counts, strict=True))}
        rows.append({"layer": l, **{name: _changed(row) for name, row in named.items()}})
    return rows


def _changed(row: np.ndarray) -> dict[str, Any] | None:
    positions, stream, own = map(int, row)
    if positions == 0:
        return None
    return {"positions": positions, "changed_percent": 100 * stream / positions, "own_percent": 100 * own / positions}


def _matrices(pair: Pair, ledger: Ledger) -> list[dict[str, Any]]:
    """Every tensor that is packed or differs, worst first: by its output, or by its numbers where it has none."""
    rows = []
    for name, weights in ledger.weights.items():
        form = pair.quantized.form_of(name)
        output = ledger.outputs[name].figures() if name in ledger.outputs else None
        rows.append({"tensor": name.removesuffix(WEIGHT), "module": module_of(name),
                     "form": None if form is None else form.describe(), "weights": weights, "output": output})
    return sorted(rows, key=lambda row: (-rank(row["output"]["all"] if row["output"] else row["weights"]),
                                         row["tensor"]))

"""Which experts the calibration tokens reached, by layer and modality: as numbers, as a table, as a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vl2.calib.statistics import IMAGE, TEXT
from vl2.errors import VL2Error
from vl2.json_file import read_json, to_json

MODALITIES = {"all": slice(None), "text": slice(TEXT, TEXT + 1), "image": slice(IMAGE, IMAGE + 1)}


@dataclass(frozen=True)
class Coverage:
    """layer → int64 [E, 2]: tokens that reached each expert, text and image."""

    counts: dict[int, Tensor]


@dataclass(frozen=True)
class LayerCoverage:
    """Tokens per expert of one layer and modality ("all", "text", "image"), and how many experts got none."""

    layer: int
    modality: str
    fewest: int
    median: float
    most: int
    experts_without: int
    experts: int


def write_counts(work_dir: Path, l: int, counts: Tensor) -> None:
    """Keeps the counts of layer l, int64 [E, 2], whole or not at all."""
    path = _counts_path(work_dir, l)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"layer": l, "counts": counts.tolist()}), encoding="utf-8")
    partial.replace(path)


def read_coverage(work_dir: Path) -> Coverage:
    """The counts of the layers that `stream_layers` has been through. Raises VL2Error when there are none."""
    found = [read_json(path) for path in sorted(work_dir.glob("counts_*.json"))]
    if not found:
        raise VL2Error(f"{work_dir} has no expert counts",
                       "give the work folder of a calibration, of a model with experts")
    return Coverage({values["layer"]: torch.tensor(values["counts"]) for values in found})


def summarise(coverage: Coverage) -> list[LayerCoverage]:
    """Three rows for each layer: all tokens, text, image."""
    rows = []
    for l, counts in coverage.counts.items():
        for modality, columns in MODALITIES.items():
            tokens = counts[:, columns].sum(dim=1)
            rows.append(LayerCoverage(l, modality, int(tokens.min()), float(tokens.double().quantile(0.5)),
                                      int(tokens.max()), int((tokens == 0).sum()), len(tokens)))
    return rows


def coverage_facts(coverage: Coverage) -> dict[str, Any]:
    """For quantization.json: `layers`, the rows of `summarise`; `without_tokens`, layer → modality → the experts that
    no such token reached, where there are any."""
    without: dict[str, dict[str, list[int]]] = {}
    for l, counts in coverage.counts.items():
        for modality, columns in MODALITIES.items():
            experts = (counts[:, columns].sum(dim=1) == 0).nonzero()[:, 0].tolist()
            if experts:
                without.setdefault(str(l), {})[modality] = experts
    return {"layers": [to_json(row) for row in summarise(coverage)], "without_tokens": without}


def format_table(coverage: Coverage) -> str:
    """A Markdown table of `summarise`."""
    lines = ["| layer | tokens | min | median | max | experts with none |", "|---:|---|---:|---:|---:|---:|"]
    for row in summarise(coverage):
        lines.append(f"| {row.layer} | {row.modality} | {row.fewest} | {row.median:g} | {row.most} | "
                     f"{row.experts_without} of {row.experts} |")
    return "\n".join(lines)


def plot_heatmap(coverage: Coverage, path: Path) -> None:
    """Layers × experts, one panel a modality, on a logarithmic scale where experts without tokens stay white.

    path: ends in .png, .svg or .pdf. Raises VL2Error when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise VL2Error("matplotlib is not installed; it draws the heatmap", "pip install matplotlib") from error
    layers, experts = list(coverage.counts), max(len(counts) for counts in coverage.counts.values())
    size = max(6.0, 0.14 * experts + 2), 3 * max(1.6, 0.16 * len(layers) + 0.8)  # inches
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    most = max(int(counts.sum(dim=1).max()) for counts in coverage.counts.values())
    for axes, (modality, columns) in zip(figure.subplots(3, 1, sharex=True), MODALITIES.items(), strict=True):
        tokens = torch.stack([counts[:, columns].sum(dim=1) for counts in coverage.counts.values()]).double()
        shown = tokens.masked_fill(tokens == 0, torch.nan)  # a logarithm of none: left white
        image = axes.imshow(shown, aspect="auto", norm=LogNorm(1, max(most, 2)), interpolation="nearest")
        axes.set_title(f"{modality}: {int((tokens == 0).sum())} of {tokens.numel()} experts without tokens")
        axes.set_ylabel("layer")
        axes.set_yticks(range(len(layers)), layers)
    axes.set_xlabel("expert")
    figure.colorbar(image, ax=figure.axes, label="tokens")
    figure.savefig(path, dpi=120)


def _counts_path(work_dir: Path, l: int) -> Path:
    return work_dir / f"counts_{l:03}.json"

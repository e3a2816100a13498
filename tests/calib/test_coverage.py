from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vl2.calib.coverage import (
    Coverage,
    LayerCoverage,
    format_table,
    plot_heatmap,
    read_coverage,
    summarise,
    write_counts,
)
from vl2.errors import VL2Error

COUNTS = {1: torch.tensor([[1, 9], [0, 4], [3, 0], [0, 0]]), 2: torch.tensor([[5, 5], [5, 5], [5, 5], [5, 5]])}


def test_a_layer_is_summed_up_for_all_tokens_and_by_modality() -> None:
    assert summarise(Coverage(COUNTS))[:3] == [
        LayerCoverage(1, "all", 0, 3.5, 10, 1, 4),
        LayerCoverage(1, "text", 0, 0.5, 3, 2, 4),
        LayerCoverage(1, "image", 0, 2.0, 9, 2, 4),
    ]


def test_the_table_has_a_line_for_each_layer_and_modality() -> None:
    lines = format_table(Coverage(COUNTS)).splitlines()
    assert len(lines) == 2 + 2 * 3
    assert lines[2] == "| 1 | all | 0 | 3.5 | 10 | 1 of 4 |"


def test_counts_are_read_as_they_were_written(tmp_path: Path) -> None:
    for l, counts in COUNTS.items():
        write_counts(tmp_path, l, counts)
    found = read_coverage(tmp_path).counts
    assert found.keys() == COUNTS.keys() and all(found[l].equal(COUNTS[l]) for l in COUNTS)


def test_a_folder_without_counts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VL2Error, match="no expert counts"):
        read_coverage(tmp_path)


def test_the_heatmap_is_a_picture_with_white_for_experts_without_tokens(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_heatmap(Coverage(COUNTS), tmp_path / "coverage.png")
    with Image.open(tmp_path / "coverage.png") as image:
        assert image.width > 300 and len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_without_matplotlib_the_heatmap_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(VL2Error, match="matplotlib is not installed"):
        plot_heatmap(Coverage(COUNTS), tmp_path / "coverage.png")

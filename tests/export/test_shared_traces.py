"""A trace that another worker wrote is as good as one's own: bundles made of both have the same bytes."""

from pathlib import Path

import onnx_ir as ir
import pytest

from tests.shared_traces import read_trace, write_trace
from vl2.export import ExportOptions, assemble, export_checkpoint


@pytest.mark.parametrize("lowering", ["portable", "cpu"])
def test_traces_that_went_through_files_make_the_same_bundle(
    goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowering: str
) -> None:
    made, options = assemble._traced, ExportOptions("fp16", lowering=lowering, verify=False)

    def through_a_file(kind: assemble._Kind) -> ir.Graph:
        write_trace(made(kind), tmp_path / f"{kind.name}.onnx")
        return read_trace(tmp_path / f"{kind.name}.onnx")

    plain = export_checkpoint(goldens / "small-mini", tmp_path / "plain", options)
    monkeypatch.setattr(assemble, "_traced", through_a_file)
    assert export_checkpoint(goldens / "small-mini", tmp_path / "filed", options).files == plain.files
    assert list(tmp_path.glob("*.onnx"))

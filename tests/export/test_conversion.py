"""Bad numbers and unsupported settings: refused by name, or counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export.checkpoints import change_config, change_tensor, copy_checkpoint
from vl2.errors import VL2Error
from vl2.export import ExportOptions, export_checkpoint, plan_export

TENSOR = "language.model.layers.1.mlp.experts.3.up_proj.weight"
UNVERIFIED = ExportOptions(scheme="fp16", verify=False)


@pytest.fixture
def checkpoint(goldens: Path, tmp_path: Path) -> Path:
    return copy_checkpoint(goldens / "tiny-mini", tmp_path / "checkpoint")


def set_first(value: float):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


def test_a_value_beyond_float16_is_refused_with_tensor_and_file(checkpoint: Path, tmp_path: Path) -> None:
    path = change_tensor(checkpoint, TENSOR, set_first(-7e4))
    with pytest.raises(VL2Error) as caught:
        export_checkpoint(checkpoint, tmp_path / "bundle", UNVERIFIED)
    for part in (TENSOR, str(path), "70000", "65504", "--scheme fp32"):
        assert part in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_what_float16_turns_into_zero_is_counted_by_tensor(checkpoint: Path, tmp_path: Path) -> None:
    change_tensor(checkpoint, TENSOR, set_first(1e-9))
    manifest = export_checkpoint(checkpoint, tmp_path / "bundle", UNVERIFIED)
    assert manifest.conversion == {"underflow": {TENSOR: 1}}
    assert manifest.verify == {"status": "skipped"}


def test_a_nan_is_refused_with_tensor_and_file(checkpoint: Path, tmp_path: Path) -> None:
    path = change_tensor(checkpoint, TENSOR, set_first(float("nan")))
    with pytest.raises(VL2Error, match="NaN") as caught:
        export_checkpoint(checkpoint, tmp_path / "bundle", UNVERIFIED)
    assert TENSOR in str(caught.value) and str(path) in str(caught.value)


def test_a_cut_off_file_is_refused_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(VL2Error, match="model.safetensors"):
        export_checkpoint(checkpoint, tmp_path / "bundle", UNVERIFIED)
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint"}


def test_frequencies_that_change_with_the_length_cannot_be_exported(checkpoint: Path) -> None:
    scaling = {"type": "dynamic", "factor": 2.0}
    change_config(checkpoint, lambda config: config["language_config"].update(rope_scaling=scaling))
    with pytest.raises(VL2Error, match="dynamic"):
        plan_export(checkpoint, ExportOptions())


def test_an_unknown_scheme_is_refused_with_the_known_ones(checkpoint: Path) -> None:
    with pytest.raises(VL2Error, match="int3") as caught:
        plan_export(checkpoint, ExportOptions(scheme="int3"))
    assert "fp32, fp16" in str(caught.value)


def test_a_folder_that_does_not_exist_is_named() -> None:
    with pytest.raises(VL2Error, match="/nowhere"):
        plan_export(Path("/nowhere"), ExportOptions())


def test_planning_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    plan = plan_export(checkpoint, ExportOptions())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert plan.to_dict()["graphs"].keys() == {"vision", "decoder", "embeddings"}
    assert "peak memory" in plan.describe() and "time" in plan.describe()

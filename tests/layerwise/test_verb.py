"""`vl2 layers`, and `vl2 compare` with what it wrote, on vl2-nano."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import NANO
from vl2.accuracy.layers import read_layers, refuse_other_checkpoint
from vl2.cli import cli, run_command
from vl2.errors import VL2Error

HELDOUT = NANO.parent / "heldout" / "heldout.jsonl"


@pytest.fixture(scope="module")
def quantized(quantized_of: Callable[..., Path]) -> Path:
    return quantized_of(NANO, "int4")


@pytest.fixture(scope="module")
def figures(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("figures") / "layers.json"
    assert vl2("layers", NANO, quantized, "--data", HELDOUT, "--samples", 2, "--out", out) == 0
    return out


def vl2(*arguments: object) -> int:
    return run_command(cli, "vl2", [str(argument) for argument in arguments])


def test_the_verb_writes_a_file_and_prints_tables(quantized: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "layers.json"
    arguments = ("layers", NANO, quantized, "--data", HELDOUT, "--samples", 1, "--out", out)
    assert vl2(*arguments) == 0
    printed = capsys.readouterr().out
    for title in ("blocks", "routers", "matrices"):
        assert f"## Where it was lost: {title}\n" in printed
    assert "∞" in printed and "nan" not in printed.lower().split()
    assert [path.name for path in tmp_path.iterdir()] == ["layers.json"], "no work folder is left"
    assert read_layers(out)["data"]["conversations"] == 1
    assert vl2(*arguments) == 1 and "--force" in capsys.readouterr().err
    (tmp_path / "notes.json").write_text("{}")
    assert vl2(*arguments[:-1], tmp_path / "notes.json", "--force") == 1
    assert "no layer report" in capsys.readouterr().err and (tmp_path / "notes.json").read_text() == "{}"


def test_compare_takes_the_figures_into_its_report(
    quantized: Path, figures: Path, bundle_of: Callable[..., Path], nano_bundle: Path, tmp_path: Path, capsys
) -> None:
    pytest.importorskip("matplotlib")
    bundle = bundle_of(quantized, None, "ort")
    arguments = ("--data", HELDOUT, "--limit", 2, "--max-new-tokens", 4, "--layers", figures)
    assert vl2("compare", nano_bundle, bundle, *arguments, "--out", tmp_path / "report") == 0
    assert "## Where it was lost: routers\n" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["layers"] == read_layers(figures)
    assert report["not_measured"] == ["the prompt's text positions: recorded without --prompt-text"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "<h2>Where it was lost: blocks</h2>" in page
    worst = report["layers"]["matrices"][0]["tensor"]
    assert f"<td>{worst}</td>" in page and worst in (tmp_path / "report" / "report.md").read_text()
    assert vl2("compare", nano_bundle, nano_bundle, *arguments) == 1
    assert "is not the quantized checkpoint that the bundle" in capsys.readouterr().err


def test_a_bundle_made_in_one_command_is_known_by_recipe_method_and_calibration(figures: Path) -> None:
    layers = read_layers(figures)
    made = {name: layers["quantized"][name] for name in ("recipe", "method", "calibration")}
    manifest = SimpleNamespace(source=SimpleNamespace(name="nano", files=layers["reference"]["files"]),
                               quantization=made, scheme="int4")
    refuse_other_checkpoint(figures, layers, manifest)
    manifest.quantization = {**made, "method": "gptq"}
    with pytest.raises(VL2Error, match="not the quantized checkpoint"):
        refuse_other_checkpoint(figures, layers, manifest)


def test_a_file_of_a_newer_version_is_refused(figures: Path, tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text(json.dumps({**read_layers(figures), "schema_version": 9}))
    with pytest.raises(VL2Error, match="schema_version is 9"):
        read_layers(tmp_path / "new.json")

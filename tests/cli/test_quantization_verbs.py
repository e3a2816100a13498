"""`vl2 calibrate`, `vl2 quantize` and `vl2 export` with an integer scheme, in this process and in killed ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from PIL import Image

from tests.conftest import GOLDENS
from tests.forked import dies, in_a_child
from vl2.cli import cli, run_command
from vl2.cli.options import METHODS, RECIPES, ByteSize, Share
from vl2.folder_lock import work_folder
from vl2.json_file import read_json
from vl2.quant import method as quant_method
from vl2.quant import recipe as quant_recipe
from vl2.quant.quantizer import Quantizer

TINY = GOLDENS / "tiny-mini"


@pytest.fixture
def vl2(capfd: pytest.CaptureFixture[str]):
    """`vl2(arguments)`: exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = run_command(cli, "vl2", [str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verbs") / "calibration"
    assert run_command(cli, "vl2", ["calibrate", str(TINY), "--out", str(out), "--samples", "2"]) == 0
    return out


def test_the_names_offered_are_those_of_the_quantizer() -> None:
    assert METHODS == tuple(quant_method.METHODS) and RECIPES == tuple(quant_recipe.BUILTIN)


@pytest.mark.parametrize("text, size", [("4GB", 4e9), ("500 MB", 5e8), ("1.5GiB", 1.5 * 2**30), ("7", 7)])
def test_sizes_are_read_with_their_units(text: str, size: float) -> None:
    assert ByteSize().convert(text, None, None) == size


@pytest.mark.parametrize("kind, text", [(ByteSize(), "much"), (ByteSize(), "0"), (Share(), "110%"), (Share(), "-1")])
def test_what_is_no_size_or_share_is_wrong_usage(kind: click.ParamType, text: str) -> None:
    with pytest.raises(click.BadParameter):
        kind.convert(text, None, None)


def test_calibrating_tells_which_experts_were_reached(vl2, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (90, 60), (20, 90, 200)).save(tmp_path / name)
    out, plot = tmp_path / "out", tmp_path / "heat.png"
    code, told, talk = vl2("calibrate", TINY, "--data", tmp_path, "--out", out, "--plot", plot, "--json")
    assert code == 0, talk
    facts = json.loads(told)
    assert facts["conversations"] == 2 and facts["image_tokens"] > 0 and plot.stat().st_size > 1000
    assert {row["layer"] for row in facts["coverage"]} == {1, 2, 3} and facts["coverage"][0]["experts"] == 12
    assert not out.with_name("out.partial").exists() and "2 of 2 rows" in talk
    code, _, talk = vl2("calibrate", TINY, "--data", tmp_path, "--out", out)
    assert code == 1 and "exists" in talk


def test_bad_rows_are_named_and_stop_the_run_above_the_share_that_is_tolerated(vl2, tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text('{"question": "How are you?", "answer": "Well."}\n{"question": 3}\n')
    code, _, talk = vl2("calibrate", TINY, "--data", data, "--out", out)
    assert code == 1 and "data.jsonl:2" in talk and "5%" in talk and not out.exists()
    code, told, talk = vl2("calibrate", TINY, "--data", data, "--out", out, "--tolerate", "50%")
    assert code == 0 and "bad row left out" in talk and "experts with none" in told


def test_more_memory_than_allowed_is_refused_before_any_work(vl2, calibration: Path, tmp_path: Path) -> None:
    code, _, talk = vl2("calibrate", TINY, "--out", tmp_path / "c", "--samples", 2, "--max-ram", "100MB")
    assert code == 1 and "0.1 GB" in talk and "hint" in talk
    code, _, talk = vl2("quantize", TINY, "--scheme", "int4", "--calib", calibration, "--out", tmp_path / "q",
                        "--max-ram", "100MB")
    assert code == 1 and "--max-ram" in talk and list(tmp_path.iterdir()) == []


def test_quantizing_with_and_without_calibration_says_what_was_made(vl2, calibration: Path, tmp_path: Path) -> None:
    code, told, talk = vl2("quantize", TINY, "--scheme", "int4", "--calib", calibration, "--out", tmp_path / "q",
                           "--head", "int8", "--vision", "int8", "--embeddings", "int8", "--json")
    assert code == 0, talk
    facts = json.loads(told)
    assert (facts["scheme"], facts["method"]) == ("int4", "awq+gptq") and facts["calibration"]["synthetic"] is True
    assert facts["size_bytes"] == sum(read_json(tmp_path / "q" / "quantization.json")["modules"].values())
    assert "text tokens an expert: at least" in talk and "image tokens an expert: at least" in talk
    matrices = read_json(tmp_path / "q" / "quantization.json")["matrices"]
    tower = [matrix for matrix in matrices if matrix["module"].startswith("vision.blocks.")]
    assert tower and all(matrix["tokens"] > 0 and matrix["over_rtn"] <= 1 for matrix in tower)
    assert len(facts["coverage"]["layers"]) == 9 and "Calibration tokens that an expert got" in (
        tmp_path / "q" / "README.md").read_text()
    code, told, talk = vl2("quantize", TINY, "--scheme", "int8", "--out", tmp_path / "plain")
    assert code == 0 and "int8 by search" in told, talk
    code, _, talk = vl2("quantize", TINY, "--scheme", "int8", "--method", "gptq", "--out", tmp_path / "no")
    assert code == 1 and "calibrat" in talk and not (tmp_path / "no").exists()


def test_a_dry_run_tells_sizes_memory_and_time_and_writes_nothing(vl2, calibration: Path, tmp_path: Path) -> None:
    for verb, given in (("quantize", calibration), ("export", calibration)):
        code, told, talk = vl2(verb, TINY, "--scheme", "int4", "--calib", given, "--out", tmp_path / "x", "--dry-run",
                               "--json")
        assert code == 0, talk
        plan = json.loads(told)
        assert plan["total_bytes"] == sum(plan["modules"].values()) and plan["peak_memory_bytes"] > 100e6
        assert plan["seconds"] > 0 and plan["calibration_tokens"] > 0
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_calibration_set_is_refused_with_the_command_that_makes_one(vl2, tmp_path: Path) -> None:
    code, _, talk = vl2("quantize", TINY, "--scheme", "int4", "--calib", tmp_path, "--out", tmp_path / "q")
    assert code == 1 and "vl2 calibrate" in talk


@pytest.mark.parametrize("options", [("--calib", "x"), ("--method", "rtn"), ("--scheme", "fp16", "--head", "int8"),
                                     ("--scheme", "int4", "--calib", "x", "--no-calib"),
                                     ("--samples", "4"), ("--scheme", "fp16", "--seed", "3"),
                                     ("--scheme", "int4", "--no-calib", "--tokens", "9")])
def test_options_without_meaning_are_wrong_usage(vl2, tmp_path: Path, options: tuple[str, ...]) -> None:
    code, _, talk = vl2("export", TINY, "--out", tmp_path / "b", *options)
    assert code == 2 and "Usage" in talk


@pytest.mark.parametrize("more", [("--scheme", "int4"), ("--budget", "1GB")])
def test_a_finished_set_is_not_sampled_again(vl2, calibration: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    asked = ("export", TINY, "--out", tmp_path / "b", "--calib", calibration, *more)
    for option in (("--samples", 4), ("--tokens", 99), ("--seed", 1), ("--tolerate", "1%")):
        code, _, talk = vl2(*asked, *option)
        assert code == 2 and option[0] in talk and "was sampled when it was made" in " ".join(talk.split())


@pytest.mark.parametrize("verb", ["export", "quantize"])
def test_a_recipe_that_quantizes_nothing_is_refused_before_any_work(vl2, tmp_path: Path, verb: str) -> None:
    recipe = tmp_path / "none.json"
    recipe.write_text(json.dumps({"name": "none", "rules": [{"modules": "*", "scheme": "keep"}]}))
    code, _, talk = vl2(verb, TINY, "--scheme", recipe, "--out", tmp_path / "out")
    assert code == 1 and "quantizes nothing" in talk and "--scheme fp16" in talk and "calibrating" not in talk
    assert [path.name for path in tmp_path.iterdir()] == ["none.json"]


LOCKED = """
import sys, time
from pathlib import Path
from vl2.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1]), "quantized export"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_work_folder_belongs_to_one_process_until_that_ends_in_any_way(vl2, tmp_path: Path) -> None:
    work = tmp_path / "b.work"
    work.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", LOCKED, str(work)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        asked = ["export", TINY, "--scheme", "int8", "--no-calib", "--method", "rtn", "--no-verify",
                 "--out", tmp_path / "b"]
        code, _, talk = vl2(*asked)
        assert code == 1 and "another quantized export writes to" in talk and str(work) in talk
        assert list(work.iterdir()) == [], "nothing was begun"
    finally:
        holder.kill()
        holder.wait()
    assert vl2(*asked)[0] == 0


@pytest.mark.parametrize("verb, options, what", [
    ("quantize", ("--scheme", "int8", "--method", "rtn"), "quantization"),
    ("calibrate", ("--samples", "2"), "calibration")])
def test_two_processes_do_not_make_one_folder(vl2, tmp_path: Path, verb: str, options: tuple, what: str) -> None:
    out, work = tmp_path / "out", tmp_path / "out.partial"
    with work_folder(work, what):
        code, _, talk = vl2(verb, TINY, *options, "--out", out)
        assert code == 1 and f"another {what} writes to {work}" in talk and list(work.iterdir()) == []
    code, _, talk = vl2(verb, TINY, *options, "--out", out)
    assert code == 0 and [path.name for path in tmp_path.iterdir()] == ["out"], talk


def test_the_quantized_checkpoint_stays_where_it_was_asked_to_and_gives_the_same_bundle(vl2, tmp_path: Path) -> None:
    kept, quick = tmp_path / "kept", ("--no-calib", "--method", "rtn")
    asked = ["export", TINY, "--scheme", "int8", *quick, "--no-verify", "--keep-checkpoint", kept, "--out"]
    code, _, talk = vl2(*asked, tmp_path / "one")
    assert code == 0 and not (tmp_path / "one.work").exists(), talk
    assert vl2("export", kept, "--no-verify", "--out", tmp_path / "two")[0] == 0
    one, two = (read_json(tmp_path / name / "manifest.json")["files"] for name in ("one", "two"))
    assert one == two
    code, _, talk = vl2(*asked, tmp_path / "three")
    assert code == 1 and "kept exists" in talk and not (tmp_path / "three.work").exists()


def killed_at_layer_2(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the command in a process that dies when it comes to quantize layer 2."""
    plain = Quantizer.quantize_layer

    def quantize_layer(self, layer, stage, statistics):
        if layer == 2:
            dies()
        return plain(self, layer, stage, statistics)

    with monkeypatch.context() as patch:
        patch.setattr(Quantizer, "quantize_layer", quantize_layer)
        assert not in_a_child(lambda: run_command(cli, "vl2", [str(argument) for argument in arguments]))


def test_one_command_makes_a_bundle_and_goes_on_after_it_was_killed(vl2, tmp_path: Path, monkeypatch) -> None:
    out, work = tmp_path / "b", tmp_path / "b.work"
    asked = ["export", TINY, "--scheme", "int4", "--samples", 2, "--no-verify", "--out", out]
    killed_at_layer_2(asked, monkeypatch)
    finished = sorted(path.name for path in (work / "tiny-mini-int4.partial").glob("model-*.json"))
    assert len(finished) == 4 and not out.exists(), "layers 0 and 1"
    code, _, talk = vl2(*asked, "--method", "rtn")
    assert code == 1 and "other" not in talk.split("hint")[1] and str(work) in talk
    code, told, talk = vl2(*asked, "--json")
    assert code == 0 and "going on" in talk and not work.exists(), talk
    facts = json.loads(told)
    assert facts["scheme"] == "int4" and facts["quantization"]["calibration"]["synthetic"] is True
    manifest = read_json(out / "manifest.json")
    assert manifest["quantization"]["method"] == "awq+gptq"
    assert manifest["source"]["name"] == "tiny-mini" and manifest["source"]["files"].keys() == {
        "config.json", *(path.name for path in TINY.glob("*.safetensors"))}, "the user's, not the work folder's"
    rows = manifest["quantization"]["coverage"]["layers"]
    assert {(row["layer"], row["modality"]) for row in rows} == {
        (l, modality) for l in (1, 2, 3) for modality in ("all", "text", "image")}
    assert "image tokens an expert: at least" in talk
    code, _, talk = vl2(*asked)
    assert code == 1 and "exists" in talk, "before hours of calibration"
    shutil.rmtree(out)

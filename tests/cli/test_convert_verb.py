"""`vl2 convert`, and what its folders are for: exported and opened like our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import GOLDENS
from tests.quant.gptq_files import gptq_file
from vl2.cli import cli, run_command
from vl2.config import load_config
from vl2.quant.linears import is_router, matrices

TINY = GOLDENS / "tiny-mini"


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    modules = [m for m in matrices(load_config(TINY)) if m.startswith("language.model.layers.") and not is_router(m)]
    return gptq_file(TINY, tmp_path / "gptq", modules, group=64).save()


def vl2(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run_command(cli, "vl2", [str(argument) for argument in arguments])
    return code, *capfd.readouterr()


def test_a_gptq_folder_becomes_a_checkpoint_that_exports(capfd, gptq: Path, tmp_path: Path) -> None:
    out, bundle = tmp_path / "out", tmp_path / "bundle"
    code, told, talk = vl2(capfd, "convert", gptq, "--out", out, "--json")
    assert code == 0, talk
    facts = json.loads(told)
    assert facts["scheme"] == "gptq-int4-g64" and facts["made_by"] == "gptqmodel:5.7.0" and "groups split" in talk
    assert facts["matrices"] == sum(facts["forms"].values()) == len(json.loads(
        (out / "quantization.json").read_text())["matrices"])
    code, told, talk = vl2(capfd, "export", out, "--out", bundle, "--json")
    assert code == 0, talk
    made = json.loads(told)
    assert made["scheme"] == "gptq-int4-g64" and made["verify"]["status"] == "passed"
    assert made["quantization"]["calibration"] == {"format": "unknown", "made_by": "gptqmodel:5.7.0"}
    code, _, talk = vl2(capfd, "convert", gptq, "--out", out)
    assert code == 1 and "exists" in talk and "--force" in talk


def test_a_dry_run_tells_the_size_that_comes_out_and_force_replaces_only_checkpoints(capfd, gptq, tmp_path) -> None:
    out = tmp_path / "out"
    code, told, _ = vl2(capfd, "convert", gptq, "--dry-run", "--json")
    assert code == 0 and not out.exists() and not (tmp_path / "out.partial").exists()
    plan = json.loads(told)
    out.mkdir()
    (out / "photo.png").write_bytes(b"photo")
    code, _, talk = vl2(capfd, "convert", gptq, "--out", out, "--force")
    assert code == 1 and "no quantized checkpoint" in talk and (out / "photo.png").exists()
    (out / "photo.png").unlink()
    for _ in range(2):
        assert vl2(capfd, "convert", gptq, "--out", out, "--force")[0] == 0
    sizes = json.loads((out / "quantization.json").read_text())["modules"]
    assert plan["size_bytes"] == sum(sizes.values()) and plan["scheme"] == "gptq-int4-g64"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq", "out"]


def test_what_is_no_gptq_folder_is_refused_with_a_hint(capfd, tmp_path: Path) -> None:
    code, _, talk = vl2(capfd, "convert", TINY, "--out", tmp_path / "out")
    assert code == 1 and "quantization_config" in talk and "hint" in talk and not (tmp_path / "out.partial").exists()


def test_quantizing_for_vllm_tells_what_it_left_and_refuses_what_it_cannot_load(capfd, tmp_path: Path) -> None:
    out = tmp_path / "q"
    asked = ["quantize", TINY, "--scheme", "int4", "--method", "rtn", "--for", "vllm", "--out", out]
    code, _, talk = vl2(capfd, *asked, "--head", "int8")
    assert code == 1 and "lm_head" in talk and "hint" in talk and list(tmp_path.iterdir()) == []
    code, told, talk = vl2(capfd, *asked, "--json")
    assert code == 0 and "left in FP16 for vLLM" in talk and "--dtype float16" in talk, talk
    left = json.loads(told)["left_unquantized"]
    assert left.keys() == {"vision", "projector", "lm_head", "embed_tokens", "router"} and left["router"] == 3

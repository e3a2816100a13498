"""`vl2 engine`: fit before work, engines in the bundle, and the command for a device that has to build its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from vl2.cli import cli, run_command
from vl2.inspection import describe, inspect_path
from vl2.manifest import check_files, read_manifest, write_manifest
from vl2.planning.targets import Target
from vl2.plugins.tensorrt.build import EngineFacts, EngineJob
from vl2.plugins.tensorrt.flavour import RTX, is_installed
from vl2.plugins.tensorrt.sources import plugin_hash

needs_rtx = pytest.mark.skipif(not is_installed(RTX), reason="tensorrt-rtx is not installed")


@pytest.fixture
def bundle(goldens: Path, bundle_of, tmp_path: Path) -> Path:
    """A copy that engines may be built into."""
    return Path(shutil.copytree(bundle_of(goldens / "tiny-mini", "fp16", "trt"), tmp_path / "tiny.bundle"))


def run(bundle: Path, *arguments: str) -> int:
    return run_command(cli, "vl2", ["engine", str(bundle), *arguments])


@needs_rtx
def test_engines_are_built_into_the_bundle_and_recorded(bundle: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = ("--context", "256", "--prefill-chunk", "64", "--tiles", "2")
    assert run(bundle, "--target", "rtx-4090", "--json", *sizes) == 0
    facts = json.loads(capsys.readouterr().out)
    manifest = read_manifest(bundle)
    record = manifest.engines["rtx-4090"]
    assert record.files == {"vision": "vision.rtx-4090.engine", "decoder": "decoder.rtx-4090.engine"}
    assert (record.backend, record.compute_capability, record.kernels) == (RTX, "8.9", plugin_hash())
    assert record.sizes == {"context": 256, "prefill_chunk": 64, "tiles": 2}
    assert len(record.profiles["decoder"]) == 2 and facts["engines"]["files"] == record.files
    check_files(bundle, manifest)
    assert f"engines for rtx-4090: tensorrt-rtx {record.version}, compute capability 8.9, context 256" in describe(
        inspect_path(bundle, False))
    assert run(bundle, "--target", "rtx-4090", *sizes) == 1
    assert "has engines for rtx-4090 already" in capsys.readouterr().err
    older = replace(manifest, engines={"rtx-4090": replace(record, version="1.6.1.0")})
    write_manifest(bundle, older)
    assert run(bundle, "--target", "rtx-4090", *sizes) == 1
    told = capsys.readouterr().err
    assert "were built for version 1.6.1.0, and here it is 1.7" in told and "--target rtx-4090 --force" in told


def test_the_gpu_of_this_machine_is_built_for_whatever_its_compute_capability(
    bundle: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9.0, of an H200, has no name in TensorRT-RTX; what builds for "this GPU" has to know that it is this one."""
    here = Target("an H200", "dedicated", 139, 4800, 0.9, ("cuda", "engine"), "a test", compute_capability="9.0",
                  fp16_tflops=900)  # fmt: skip
    jobs: list[EngineJob] = []

    def built(job: EngineJob) -> EngineFacts:
        jobs.append(job)
        Path(job.out).write_bytes(b"engine")
        return EngineFacts("1.7.1.116", 6, 1.0, 1 << 20)

    monkeypatch.setattr("vl2.planning.local.local_target", lambda name: here)
    monkeypatch.setattr("vl2.plugins.tensorrt.flavour.load_tensorrt", lambda flavour: None)
    monkeypatch.setattr("vl2.plugins.tensorrt.engines.build_apart", built)
    assert run(bundle, "--target", "local", "--backend", "tensorrt-rtx", "--context", "256") == 0
    assert {(job.capabilities, job.on_this_gpu) for job in jobs} == {(("9.0",), True)}
    assert read_manifest(bundle).engines["local"].compute_capability == "9.0"
    capsys.readouterr()


def test_a_board_gets_the_command_to_run_on_it(bundle: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(bundle, "--target", "orin-nano-8gb", "--context", "2048") == 1
    told = capsys.readouterr().err
    assert "are built by tensorrt on the device itself" in told and "no GPU of compute capability 8.7" in told
    assert "vl2 engine tiny.bundle --target orin-nano-8gb --context 2048 --prefill-chunk 512 --tiles 10" in told
    assert not read_manifest(bundle).engines


def test_the_command_keeps_the_backend_that_was_asked_for(bundle: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(bundle, "--target", "rtx-3060", "--backend", "tensorrt") == 1
    assert "--tiles 10 --backend tensorrt`" in capsys.readouterr().err


def test_a_dry_run_builds_nothing(bundle: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(path.name for path in bundle.iterdir())
    assert run(bundle, "--target", "rtx-3060", "--dry-run") == 0
    assert "a run needs 0." in capsys.readouterr().out
    assert sorted(path.name for path in bundle.iterdir()) == before


def targets_file(folder: Path, **changes: object) -> Path:
    """One target in a file of a user's."""
    target = {"description": "a small GPU", "memory": "dedicated", "memory_gib": 4, "bandwidth_gb_s": 192,
              "usable_share": 0.9, "compute_capability": "8.6", "fp16_tflops": 9, "backends": ["engine"],
              "tensorrt": ["TensorRT-RTX 1.7"], "source": "a data sheet"}  # fmt: skip
    (folder / "mine.json").write_text(json.dumps({"mine": {**target, **changes}}))
    return folder / "mine.json"


def test_what_does_not_fit_is_refused_before_any_work(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = targets_file(tmp_path, memory_gib=0.5)
    assert run(bundle, "--target", "mine", "--targets", str(file)) == 1
    assert "a run on mine needs" in (told := capsys.readouterr().err) and "usable there" in told


@pytest.mark.parametrize("changes, told", [
    ({"backends": ["cpu"], "cpu_gflops": 100}, "mine runs cpu, and no TensorRT engines"),
    ({"compute_capability": None}, "has no compute_capability"),
    ({"compute_capability": "sm_86"}, "compute_capability is 'sm_86', expected two numbers"),
])  # fmt: skip
def test_targets_that_take_no_engines_are_told_why(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict, told: str
) -> None:
    assert run(bundle, "--target", "mine", "--targets", str(targets_file(tmp_path, **changes))) == 1
    assert told in capsys.readouterr().err


def test_a_bundle_of_another_lowering_is_refused_with_the_export(
    goldens: Path, bundle_of, capsys: pytest.CaptureFixture
) -> None:
    assert run(bundle_of(goldens / "tiny-mini"), "--target", "rtx-3060") == 1
    told = capsys.readouterr().err
    assert "has the lowering `portable`" in told and "vl2 export CHECKPOINT --lowering trt" in told


def test_a_chunk_longer_than_the_context_is_refused_and_the_default_is_not(
    bundle: Path, capsys: pytest.CaptureFixture
) -> None:
    asked = ("--target", "rtx-4090", "--context", "64", "--dry-run", "--json")
    assert run(bundle, *asked, "--prefill-chunk", "65") == 1
    assert "--prefill-chunk is 65 and the context 64 tokens" in capsys.readouterr().err
    assert run(bundle, *asked) == 0
    assert "--prefill-chunk 64" in json.loads(capsys.readouterr().out)["command"]


@needs_rtx
def test_an_export_builds_engines_when_it_is_told_to(goldens: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "tiny.bundle"
    words = ["export", str(goldens / "tiny-mini"), "--engine", "rtx-4060", "--no-verify", "--json", "--out", str(out)]
    assert run_command(cli, "vl2", words) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["lowering"] == "trt" and summary["engine"]["engines"]["compute_capability"] == "8.9"
    assert set(read_manifest(out).engines) == {"rtx-4060"}
    check_files(out, read_manifest(out))


def test_an_export_for_a_board_ends_with_the_bundle_and_the_command(goldens: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "tiny.bundle"
    words = ["export", str(goldens / "tiny-mini"), "--engine", "orin-nano-8gb", "--no-verify", "--out", str(out)]
    assert run_command(cli, "vl2", words) == 1
    said = capsys.readouterr()
    assert "lowering trt" in said.out and "vl2 engine tiny.bundle --target orin-nano-8gb" in said.err
    assert read_manifest(out).lowering == "trt"


@pytest.mark.parametrize("words, code, told", [
    (["--engine", "rtx-9999"], 1, "rtx-9999"), (["--engine", "cpu"], 1, "no TensorRT engines"),
    (["--engine", "rtx-4060", "--lowering", "cpu"], 2, "--lowering cpu was given"),
])  # fmt: skip
def test_an_export_refuses_an_engine_before_any_work(goldens, tmp_path, capsys, words, code, told) -> None:
    out = tmp_path / "tiny.bundle"
    assert run_command(cli, "vl2", ["export", str(goldens / "tiny-mini"), "--out", str(out), *words]) == code
    assert told in capsys.readouterr().err and not out.exists()

"""`benchmarks/gpu_peers.py`, `gpu_step.py` and `gpu_checks.py`, as far as they go without a GPU."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tests.plugins.cuda.emulated_driver import EmulatedDriver
from vl2.plugins.cuda import nvrtc, pack
from vl2.plugins.tensorrt import launcher

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SMALL = ("experts nano", "experts base-mini", "linear nano head", "latent small-mini", "latent base-mini",
         "attention nano")  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str):
        for known in ("gpu_kernels", "gpu_cases", "gpu_references", "gpu_peers", "gpu_step", "gpu_checks"):
            monkeypatch.delitem(sys.modules, known, raising=False)
        return importlib.import_module(name)

    return load


def test_pytorch_computes_what_the_kernels_are_checked_against(benchmark) -> None:
    peers = benchmark("gpu_peers")
    checked = 0
    for tokens in (1, 20):
        for name, make in peers.gpu_cases.cases(peers.Extent(tokens, 70, False)):
            if name.startswith(SMALL):
                case = make(np.random.default_rng(0), name)
                assert peers.error_of(case, peers.peer_of(make)(peers.tensors(case, "cpu"))) < peers.AGREES, name
                checked += 1
    assert checked > 40


def test_every_chosen_case_exists_and_has_a_peer(benchmark) -> None:
    peers = benchmark("gpu_peers")
    cases = dict(peers.gpu_cases.cases(peers.Extent(1024, 2000, True)))
    for chosen in peers.CHOSEN:
        found = [make for name, make in cases.items() if name.startswith(chosen)]
        assert found and all(make.func in peers.PEERS for make in found), chosen


def test_a_step_has_every_layers_kernels_and_is_timed_through_the_driver(benchmark, emulator, monkeypatch) -> None:
    step, kernels = benchmark("gpu_step"), importlib.import_module("gpu_kernels")
    monkeypatch.setattr(launcher, "load", lambda arch: type("Pack", (), {"image": b""}))
    driver = EmulatedDriver(emulator)
    row = step.measure(kernels.Gpu(driver), "nano", 1, 1e9)
    held = step.parts(step.DECODERS["nano"])
    assert {part.case.name: part.times for part in held}["attention"] == 2
    assert row["us"] == pytest.approx(2000) and row["tokens_per_second"] == pytest.approx(500)
    # two rounds to get warm and one that counts, and before the capture each kind of kernel once
    assert driver.launches == 3 * row["kernels"] + sum(len(part.case.plan.launches) for part in held)
    assert row["read_bytes"] == sum(part.case.read_bytes * part.times for part in held)
    assert row["share_of_limit"] == pytest.approx(row["read_bytes"] / 1e9 / 2e-3) and not driver.live


def test_a_steps_kernels_are_right_in_the_emulation(benchmark, emulator, capsys) -> None:
    assert benchmark("gpu_step").main(["--emulate"]) == 0
    assert len(json.loads(capsys.readouterr().out)["errors"]) == 4


def test_what_is_missing_skips_a_check_and_a_wrong_one_fails_the_run(benchmark, tmp_path, monkeypatch, capsys):
    checks = benchmark("gpu_checks")

    def right(run) -> dict:
        return {"said": run.command(sys.executable, "-c", "print(3)").strip()}

    def wrong(run) -> dict:
        return {"said": run.command(sys.executable, "-c", "raise SystemExit('no good')")}

    monkeypatch.setattr(checks, "CHECKS", {right: (), wrong: (), checks.step: (lambda: "no GPU",)})
    assert checks.main(["--logs", str(tmp_path)]) == 1
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert rows["right"]["state"] == "ok" and rows["right"]["found"] == {"said": "3"}
    assert rows["wrong"]["state"] == "failed" and "no good" in rows["wrong"]["why"]
    assert rows["step"]["state"] == "skipped" and rows["step"]["why"] == "no GPU"
    monkeypatch.setattr(checks, "CHECKS", {right: ()})
    assert checks.main(["--logs", str(tmp_path)]) == 0


def test_wrong_kernels_are_not_timed_beside_pytorch(benchmark) -> None:
    peers = benchmark("gpu_peers")
    make = dict(peers.gpu_cases.cases(peers.Extent(20, 70, False)))["linear nano head fp16 × 1"]
    case = make(np.random.default_rng(0), "linear")
    given = {"y": case.wanted["y"].astype(np.float16)}
    peers.require_right(SimpleNamespace(check=lambda case: given), case)
    given["y"] = given["y"] + np.float16(1)
    with pytest.raises(AssertionError, match="linear: the kernels differ by"):
        peers.require_right(SimpleNamespace(check=lambda case: given), case)


def test_every_launch_before_the_capture_is_waited_for(benchmark, emulator, monkeypatch) -> None:
    """What is captured is loaded by then: no kernel's first run falls into a graph."""
    kernels, step = benchmark("gpu_kernels"), importlib.import_module("gpu_step")
    monkeypatch.setattr(launcher, "load", lambda arch: type("Pack", (), {"image": b""}))
    driver, began = EmulatedDriver(emulator), []
    begin = driver.cuStreamBeginCapture
    driver.cuStreamBeginCapture = lambda *given: (began.append(driver.launches), begin(*given))[1]
    case = step.parts(step.DECODERS["nano"])[0].case
    kernels.Gpu(driver).seconds(case, 1)
    assert began == [len(case.plan.launches)]


@pytest.mark.parametrize("broken", [ImportError("libcuda.so.1 is not there"), RuntimeError("no driver")])
def test_bindings_that_do_not_load_are_a_reason_and_no_traceback(benchmark, monkeypatch, broken) -> None:
    checks = benchmark("gpu_checks")

    class Bindings(ModuleType):
        def __getattr__(self, name: str):
            raise broken

    monkeypatch.setattr(checks, "_module", lambda name, how: lambda: "")
    monkeypatch.setitem(sys.modules, "cuda.bindings", Bindings("cuda.bindings"))
    assert checks._driver() == f"no CUDA driver can be used: {broken}"


def test_a_machine_that_cannot_compile_the_kernels_skips_what_runs_them(benchmark, monkeypatch) -> None:
    checks = benchmark("gpu_checks")
    assert all(checks._compiler in needs for needs in checks.CHECKS.values() if checks._driver in needs)
    for module, name, found in ((pack, "find_nvcc", None), (nvrtc, "find_nvrtc", None)):
        monkeypatch.setattr(module, name, lambda found=found: found)
    monkeypatch.setattr(pack, "is_cached", lambda arch: False)
    assert "nvidia-cuda-nvrtc" in checks._compiler()
    monkeypatch.setattr(pack, "is_cached", lambda arch: True)
    assert checks._compiler() == ""


def test_the_int4_check_takes_the_lowering_of_matmulnbits_and_reports_again(benchmark, monkeypatch, tmp_path) -> None:
    checks = benchmark("gpu_checks")
    said: list[tuple[str, ...]] = []
    run = checks.Run(tmp_path, tmp_path / "log")
    answer = json.dumps({"token_ids": [1], "text": "a", "tokens_per_second": 1.0})
    monkeypatch.setattr(run, "command", lambda *words: said.append(tuple(map(str, words))) or answer)
    monkeypatch.setattr(run, "engines", lambda: tmp_path / "nano-trt.bundle")
    checks.onnxruntime_cuda(run)
    checks.engine_answers(run)
    exports = [words for words in said if "export" in words and "int4" in words]
    assert exports and all("--lowering ort" in " ".join(words) for words in exports)
    compared = [" ".join(words) for words in said if "compare" in words]
    assert len(compared) == 2 and all("--limit 60" in words and "--force" in words for words in compared)
    assert "nano-int4.bundle --backend ort-cuda" in compared[0]


def test_another_answer_than_the_cpus_fails_a_check(benchmark) -> None:
    checks = benchmark("gpu_checks")
    right = {"token_ids": [1], "text": "a"}
    checks._same(right, right, "it")
    with pytest.raises(checks.Failure, match="says 'b', the CPU 'a'"):
        checks._same({"token_ids": [2], "text": "b"}, right, "it")

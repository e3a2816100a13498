"""`benchmarks/gpu_kernels.py`: its references, and its host code against a driver whose kernels are emulated."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.plugins.cuda.emulated_driver import EmulatedDriver
from vl2.plugins.tensorrt import launcher

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("gpu_kernels", "gpu_cases", "gpu_references"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("gpu_kernels")


def some_cases(benchmark, names: tuple[str, ...]):
    extent = benchmark.Extent(9, 70, False)
    return [make(np.random.default_rng(0), name) for name, make in benchmark.cases(extent) if name.startswith(names)]


def test_emulated_cases_pass_and_end_in_a_json_line(benchmark, emulator, capsys) -> None:
    assert benchmark.main(["--emulate", "--only", "base-mini"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert len(rows) == len(table) - 1 and all(row["good"] for row in rows) and "us" not in rows[0]


def test_the_host_checks_and_times_through_the_driver_and_frees_all(benchmark, emulator, monkeypatch) -> None:
    driver = EmulatedDriver(emulator)
    monkeypatch.setattr(launcher, "load", lambda arch: type("Pack", (), {"image": b""}))
    monkeypatch.setattr(benchmark, "_MOST_COPIES", 2)
    gpu = benchmark.Gpu(driver)
    assert gpu.architecture == "sm_90" and gpu.name == "emulated"
    for case in some_cases(benchmark, ("route v3 × 9", "experts nano int4 g32", "latent small 1", "attention nano 9")):
        row = benchmark.measure(gpu, case, 1, 1e12)
        assert row["good"], row
        assert row["us"] == pytest.approx(1000) and row["gb_per_s"] == pytest.approx(case.read_bytes / 1e6)
        assert not driver.live
    assert driver.launches > 30


def test_a_wrong_result_fails_the_run(benchmark, emulator, monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark, "error_of", lambda case, results: float("inf"))
    assert benchmark.main(["--emulate", "--only", "route small"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_nothing_selected_is_not_a_success(benchmark, emulator) -> None:
    assert benchmark.main(["--emulate", "--only", "no such case"]) == 1

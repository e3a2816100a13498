"""Which backend a bundle gets: the fastest that works here, or the one that was asked for, or an error that helps."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.runtime.engines.conftest import Machine, with_engines
from tests.runtime.engines.fake_cuda import FakeDriver
from vl2.backends import BACKENDS
from vl2.cli import cli, run_command
from vl2.errors import VL2Error
from vl2.manifest import read_manifest, write_manifest
from vl2.plugins.tensorrt.flavour import load_tensorrt
from vl2.runtime import BundleOptions, Model, open_bundle
from vl2.runtime.engines.device import Device, open_device


def opened(bundle: Path, **options: object) -> Model:
    return open_bundle(bundle, BundleOptions(check_hashes=False, **options))


def refusal(bundle: Path, **options: object) -> VL2Error:
    with pytest.raises(VL2Error) as caught:
        opened(bundle, **options)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("asked", [{}, {"backend": "trt-rtx"}])
def test_engines_that_fit_are_taken_and_said_in_one_line(tiny: Path, machine: Machine, asked: dict) -> None:
    said = opened(with_engines(tiny), **asked).backend
    assert said == ("TensorRT-RTX 1.7.1.116, engines for rtx-4090 on a fake GPU (compute capability 8.9), decode steps "
                    "as CUDA graphs")


def test_a_bundle_without_engines_names_the_command_that_builds_them(tiny: Path) -> None:
    """As it is on a machine without TensorRT and GPU."""
    for asked in ("auto", "trt", "trt-rtx"):
        error = refusal(tiny, backend=asked)
        assert "has the lowering `trt`, which engines alone run, and none were built" in error.message
        assert f"vl2 engine {tiny} --target local" in error.hint and "without --lowering trt" in error.hint


@pytest.mark.parametrize("change, told, mend", [
    ({"compute_capability": "8.6"}, "built for compute capability 8.6, and here it is 8.9",
     "vl2 engine BUNDLE --target local --backend tensorrt-rtx"),
    ({"version": "1.6.0.1"}, "built for version 1.6.0.1, and here it is 1.7.1.116", "--target rtx-4090 --force"),
    ({"kernels": "b" * 64}, "need plugins of the sources bbbbbbbbbbbb", "--target rtx-4090 --force"),
])  # fmt: skip
def test_engines_that_do_not_fit_are_refused_with_the_command(tiny: Path, machine: Machine, change: dict, told: str,
                                                             mend: str) -> None:
    with_engines(tiny, **change)
    for asked in ("auto", "trt-rtx"):
        error = refusal(tiny, backend=asked)
        assert told in error.message and mend in error.hint


def test_the_engines_that_fit_are_found_among_those_of_several_gpus(tiny: Path, machine: Machine) -> None:
    with_engines(with_engines(tiny, "rtx-3060", compute_capability="8.6"), "rtx-4090")
    assert "engines for rtx-4090" in opened(tiny).backend


def test_why_faster_engines_were_not_taken_is_said(tiny: Path, machine: Machine) -> None:
    with_engines(with_engines(tiny, "local", backend="tensorrt", version="10.3.0"), "rtx-4090")
    said = opened(tiny).backend
    assert said.startswith("TensorRT-RTX") and "\n" not in said
    assert said.endswith("(not trt: the engines for local were built for version 10.3.0, and here it is 1.7.1.116)")


def test_engines_of_the_other_tensorrt_are_not_taken_in_its_place(tiny: Path, machine: Machine) -> None:
    error = refusal(with_engines(tiny), backend="trt")
    assert "run here: there are none of tensorrt, it has those for rtx-4090 (tensorrt-rtx)" in error.message
    assert "--target local --backend tensorrt`" in error.hint


def test_a_tensorrt_that_is_not_installed_is_told_with_its_installation(tiny: Path, machine: Machine,
                                                                       monkeypatch) -> None:
    monkeypatch.setattr("vl2.runtime.engines.find.load_tensorrt", load_tensorrt)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    error = refusal(with_engines(tiny))
    assert "tensorrt-rtx cannot be imported" in error.message and "'.[engine]'" in error.hint


def test_cuda_bindings_that_are_not_installed_are_told(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(VL2Error, match="cuda-bindings cannot be imported") as caught:
        open_device()
    assert "pip install cuda-bindings" in caught.value.hint


def test_a_machine_without_a_driver_or_a_gpu_is_told(tiny: Path, machine: Machine, monkeypatch) -> None:
    def absent(flags):
        raise RuntimeError('"cuda" can only be found via system search')

    driver = FakeDriver()
    monkeypatch.setattr("vl2.runtime.engines.find.open_device", lambda: Device(driver))
    with_engines(tiny)
    driver.cuInit = absent
    error = refusal(tiny)
    assert "there is no CUDA driver" in error.message and "vl2 doctor" in error.hint
    driver.cuInit = lambda flags: (100,)
    assert "cuInit failed: 100" in refusal(tiny).message


@pytest.mark.parametrize("asked", [{"backend": "ort-cpu"}, {"backend": "ort-cuda"}, {"device": "cpu"},
                                   {"device": "cuda"}])  # fmt: skip
def test_onnxruntime_is_refused_for_a_bundle_that_engines_alone_run(tiny: Path, asked: dict) -> None:
    error = refusal(tiny, **asked)
    assert "which engines alone run, and ort-c" in error.message and "without --lowering trt" in error.hint


@pytest.mark.parametrize("asked", ["trt", "trt-rtx"])
def test_engines_are_refused_for_a_bundle_of_another_lowering(nano_bundle: Path, asked: str) -> None:
    error = refusal(nano_bundle, backend=asked)
    assert f"{asked} was asked for" in error.message and "of which no engines are built" in error.message
    assert "vl2 export CHECKPOINT --lowering trt" in error.hint


@pytest.mark.parametrize("device, backend", [("cpu", "ort-cuda"), ("cuda", "ort-cpu"), ("cuda", "trt"),
                                             ("cpu", "trt-rtx")])  # fmt: skip
def test_a_device_and_a_backend_that_contradict_each_other_are_refused(device: str, backend: str) -> None:
    with pytest.raises(VL2Error, match=f"the device {device} and the backend {backend} were asked for"):
        BundleOptions(device=device, backend=backend)


@pytest.mark.parametrize("device, backend, wanted", [
    ("auto", "auto", "auto"), ("cpu", "auto", "ort-cpu"), ("cuda", "auto", "ort-cuda"), ("cpu", "ort-cpu", "ort-cpu"),
    ("cuda", "ort-cuda", "ort-cuda"), *(("auto", name, name) for name in BACKENDS)])  # fmt: skip
def test_a_device_is_short_for_a_backend(device: str, backend: str, wanted: str) -> None:
    assert BundleOptions(device=device, backend=backend).wanted == wanted


def test_a_backend_that_does_not_exist_is_refused_with_the_names() -> None:
    with pytest.raises(VL2Error, match="backend is 'tensorrt', expected one of auto, trt, trt-rtx, ort-cuda, ort-cpu"):
        BundleOptions(backend="tensorrt")


@pytest.mark.parametrize("installed, asked, said", [(True, "auto", True), (True, "ort-cpu", False),
                                                    (False, "auto", False)])  # fmt: skip
def test_onnxruntime_says_why_no_engines_run_where_tensorrt_is_installed(
    nano_bundle: Path, monkeypatch, installed: bool, asked: str, said: bool
) -> None:
    monkeypatch.setattr("vl2.plugins.tensorrt.flavour.is_installed", lambda flavour: installed)
    described = opened(nano_bundle, backend=asked).backend
    assert ("not engines: the bundle has the lowering portable" in described) is said and "onnxruntime" in described


def test_the_command_line_says_which_backend_runs(tiny: Path, machine: Machine, capsys: pytest.CaptureFixture) -> None:
    arguments = ["run", str(with_engines(tiny)), "--prompt", "What?", "--max-new-tokens", "3", "--ignore-eos"]
    assert run_command(cli, "vl2", [*arguments, "--backend", "trt-rtx"]) == 0
    graphs = capsys.readouterr()
    assert graphs.err.startswith("backend: TensorRT-RTX 1.7.1.116, engines for rtx-4090 on ")
    assert graphs.err.count("\n") == 1
    assert run_command(cli, "vl2", [*arguments, "--no-cuda-graph"]) == 0
    plain = capsys.readouterr()
    assert "no CUDA graphs" in plain.err and plain.out == graphs.out


@pytest.mark.parametrize("flags, told", [
    (("--backend", "trt"), "there are none of tensorrt"), (("--backend", "ort-cpu"), "which engines alone run"),
    (("--backend", "trt-rtx", "--device", "cpu"), "the device cpu and the backend trt-rtx were asked for"),
])  # fmt: skip
def test_a_backend_that_cannot_work_ends_the_command_with_1_and_a_hint(tiny: Path, machine: Machine, flags: tuple,
                                                                      told: str, capsys) -> None:
    assert run_command(cli, "vl2", ["run", str(with_engines(tiny)), "--prompt", "What?", *flags]) == 1
    written = capsys.readouterr()
    assert told in written.err and "hint: " in written.err and written.out == ""


@pytest.mark.parametrize("change, told", [({"sizes": {"context": 64, "tiles": 1}}, "prefill_chunk"),
                                          ({"files": {}}, "decoder")])  # fmt: skip
def test_a_record_that_is_not_whole_is_told(tiny: Path, machine: Machine, change: dict, told: str) -> None:
    manifest = read_manifest(with_engines(tiny))
    engines = {name: replace(record, **change) for name, record in manifest.engines.items()}
    write_manifest(tiny, replace(manifest, engines=engines))
    error = refusal(tiny)
    assert f"says nothing of `{told}` for the engines of rtx-4090" in error.message and "--force" in error.hint


def test_a_decoder_that_lacks_a_written_cache_is_refused(tiny: Path, machine: Machine) -> None:
    manifest = read_manifest(with_engines(tiny))
    decoder = manifest.graphs["decoder"]
    graphs = {**manifest.graphs, "decoder": replace(decoder, outputs=decoder.outputs[:-1])}
    write_manifest(tiny, replace(manifest, graphs=graphs))
    assert "the outputs of the graph decoder are" in refusal(tiny).message

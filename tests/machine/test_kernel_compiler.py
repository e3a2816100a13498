"""`vl2 doctor` on what compiles the kernels that engines run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vl2.machine import gpu, jetson
from vl2.machine.check import MISSING, OK, Check
from vl2.plugins.cuda import nvrtc, pack


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch):
    """The row of a machine with an NVIDIA GPU and these compilers and packs."""

    def made(nvcc: str | None = None, library: str | None = None, packs: tuple[str, ...] = (),
             gpus: tuple[str, ...] = ("8.9",)) -> Check:  # fmt: skip
        monkeypatch.setattr(gpu, "find_gpus", lambda: [SimpleNamespace(compute_capability=each) for each in gpus])
        monkeypatch.setattr(gpu, "gpu_is_possible", lambda: True)
        monkeypatch.setattr(pack, "find_nvcc", lambda: nvcc)
        monkeypatch.setattr(nvrtc, "find_nvrtc", lambda: library)
        monkeypatch.setattr(pack, "is_cached", packs.__contains__)
        found = {check.name: check for check in gpu.check_tensorrt()}
        return found["CUDA kernels"]

    monkeypatch.setattr(gpu, "attempt", lambda code: ("1.0", ""))
    return made


def test_nvcc_or_nvrtc_is_enough(row) -> None:
    for compilers in ({"nvcc": "/usr/bin/nvcc"}, {"library": "libnvrtc.so.13"}):
        check = row(**compilers)
        assert check.status == OK and next(iter(compilers.values())) in check.detail and check.mend is None


def test_without_a_compiler_the_packs_of_the_gpus_here_are_enough(row) -> None:
    assert row(packs=("sm_89",)).status == OK
    assert row(packs=("sm_89",), gpus=("8.9", "12.0")).status == MISSING
    # compute capability 8.8 has no pack of its own
    assert row(packs=("compute_80",), gpus=("8.8",)).status == OK
    assert row(packs=("sm_89",), gpus=()).status == MISSING and row(packs=pack.ARCHITECTURES, gpus=()).status == OK


@pytest.mark.parametrize("release, compiler, bindings", [
    ("# R36 (release), REVISION: 4.3", "nvidia-cuda-nvrtc-cu12==12.6.77", "'cuda-bindings==12.*'"),
    ("# R39 (release), REVISION: 2.0", "'nvidia-cuda-nvrtc>=13'", "'cuda-bindings>=13'"),
])  # fmt: skip
def test_a_board_gets_the_packages_of_its_drivers_cuda(row, monkeypatch, tmp_path, release, compiler, bindings) -> None:
    """JetPack 6 takes nothing of CUDA 13, and CUDA 12.6 does not compile for JetPack 7's Thor."""
    (tmp_path / "release").write_text(release)
    monkeypatch.setattr(jetson, "RELEASE_FILE", tmp_path / "release")
    monkeypatch.setattr(gpu, "is_jetson", lambda: True)
    assert row().mend == f"pip install {compiler}"
    monkeypatch.setattr(gpu, "attempt", lambda code: ("", "No module named 'cuda'"))
    found = {check.name: check for check in gpu.check_tensorrt()}
    assert found["cuda-bindings"].mend == f"pip install {bindings}"


def test_neither_is_told_with_its_package(row) -> None:
    check = row()
    assert check.status == MISSING and check.mend == "pip install 'nvidia-cuda-nvrtc>=13'" and not check.required

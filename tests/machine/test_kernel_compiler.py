"""`vl2 doctor` on what compiles the kernels that engines run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vl2.machine import gpu
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


def test_neither_is_told_with_its_package(row, monkeypatch: pytest.MonkeyPatch) -> None:
    check = row()
    assert check.status == MISSING and check.mend == "pip install 'nvidia-cuda-nvrtc>=13'" and not check.required
    monkeypatch.setattr(gpu, "is_jetson", lambda: True)
    assert row().mend == "pip install nvidia-cuda-nvrtc-cu12==12.6.77"

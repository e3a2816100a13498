"""The emulated GPU, compiled once a session, and nvcc where it is at hand."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture(scope="session")
def emulator():
    """Runs launch plans on the CPU; skips without g++."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on this machine: the CUDA kernels cannot be emulated")
    from vl2.plugins.cuda.emulate import Emulator

    return Emulator()

"""The C++ host compiled for aarch64, as a Jetson board compiles it, and run under an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.plugins.tensorrt.conftest import LINEAR
from tests.plugins.tensorrt.played_host import ABI
from vl2.plugins.tensorrt.host import compile_host
from vl2.plugins.tensorrt.operators import OPERATORS

COMPILER, EMULATORS = "aarch64-linux-gnu-g++", ("qemu-aarch64", "qemu-aarch64-static")
FOLDER = Path(__file__).parent


def test_a_program_without_python_runs_the_plan_of_python_on_aarch64(tmp_path: Path) -> None:
    emulator = next(filter(shutil.which, EMULATORS), None)
    if emulator is None or shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} or qemu is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    image, library = tmp_path / "image", tmp_path / "libvl2_plugins.so"
    image.write_bytes(b"kernels\0")
    compile_host(library, {"sm_86": image}, ABI, COMPILER)
    cuda, program = str(tmp_path / "libcuda.so.1"), str(tmp_path / "program")
    flags = ["-w", "-I", str(ABI)]
    subprocess.run([COMPILER.replace("g++", "gcc"), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", cuda,
                    str(FOLDER / "fake_libcuda.c")], check=True)  # fmt: skip
    subprocess.run([COMPILER, *flags, "-o", program, str(FOLDER / "host_program.cpp"), cuda, "-ldl"], check=True)
    done = subprocess.run([emulator, "-L", "/usr/aarch64-linux-gnu", "-E", f"LD_LIBRARY_PATH={tmp_path}", program,
                           str(library)], capture_output=True, text=True)  # fmt: skip
    plan = OPERATORS["Linear"].plan(LINEAR, {"x": (1, 2, 128)})
    expected = [" ".join(map(str, (one.kernel, *one.grid, *one.block, one.shared_bytes, *one.arguments[-3:])))
                for one in plan.launches]  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()) == (0, expected), done.stderr

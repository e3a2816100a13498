"""The attention kernels against loops in float64, without onnxruntime: under sanitizers and for another processor."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "plugins"
DRIVER = Path(__file__).parent / "attention_driver.cc"
WHOLE = [DRIVER, *(PLUGINS / name for name in ("attention/shapes.cc", "attention/scratch.cc", "native/isa.cc",
                                               "native/op.cc"))]
CROSS_COMPILER, EMULATORS = "aarch64-linux-gnu-g++", ("qemu-aarch64", "qemu-aarch64-static")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover"]


def build(compiler: str, flags: dict[str, list[str]], whole: list[str], folder: Path) -> Path:
    """Compiles and links the driver; flags: of the kernel of each instruction set, whole: of everything else."""
    commands = [(source, whole) for source in WHOLE]
    commands += [(PLUGINS / "attention" / f"kernel_{isa}.cc", of_kernel) for isa, of_kernel in flags.items()]
    objects = []
    for source, of_source in commands:
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([compiler, "-std=c++17", "-w", "-I", PLUGINS, *of_source, "-c", source, "-o", objects[-1]],
                       check=True)
    subprocess.run([compiler, *whole, *objects, "-o", folder / "driver"], check=True)
    return folder / "driver"


def has_sanitizers(compiler: str) -> bool:
    program = [compiler, "-x", "c++", "-", *SANITIZERS, "-o", os.devnull]
    return subprocess.run(program, input="int main() {}", text=True, capture_output=True).returncode == 0


@pytest.mark.thorough
def test_the_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    if platform.machine() != "x86_64" or shutil.which("g++") is None or not has_sanitizers("g++"):
        pytest.skip("no g++ with sanitizers for x86-64")
    # AVX2 differs from AVX512 by its lanes only, and compiling is what this test spends its time on
    addresses = [SANITIZERS[0].removesuffix(",undefined")]
    flags = {"scalar": SANITIZERS, "avx512": addresses, "avx2": [], "amx": addresses}
    done = subprocess.run([build("g++", flags, SANITIZERS, tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and "scalar done" in done.stdout, done.stdout + done.stderr


@pytest.mark.thorough
def test_the_kernels_agree_on_an_emulated_arm_processor(tmp_path):
    emulator = next((name for name in EMULATORS if shutil.which(name)), None)
    if shutil.which(CROSS_COMPILER) is None or emulator is None:
        pytest.skip(f"{CROSS_COMPILER} or qemu is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    driver = build(CROSS_COMPILER, {"scalar": ["-O1"], "neon": ["-O1"]}, ["-static"], tmp_path)
    done = subprocess.run([emulator, driver], capture_output=True, text=True)
    assert done.returncode == 0 and "neon done" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="no g++ for x86-64")
def test_kernels_define_no_function_that_others_might_take(tmp_path):
    # A weak function compiled for AVX2 could be the one that the linker keeps for all files.
    made = tmp_path / "kernel.o"
    source = PLUGINS / "attention" / "kernel_avx2.cc"
    subprocess.run(["g++", "-std=c++17", "-w", "-O1", "-I", PLUGINS, "-c", source, "-o", made], check=True)
    symbols = subprocess.run(["nm", "-C", made], capture_output=True, text=True, check=True).stdout
    weak = [line for line in symbols.splitlines() if " W " in line or " V " in line]
    assert not weak, weak

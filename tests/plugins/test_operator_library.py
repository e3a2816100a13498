"""The operator library as a file: what it asks of onnxruntime; its sources under sanitizers and on another machine."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from tests.plugins.operator_session import ISAS, LIBRARY, needs_library, node_session

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "plugins" / "native"
DRIVER = Path(__file__).parent / "operator_driver.cc"
INCLUDES = ["-std=c++17", "-I", str(ROOT / "plugins"), "-I", str(DRIVER.parent)]
QUIET = ["-w", "-pthread"]
BY_PROCESSOR = {"x86_64": ("scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "amx"),
                "aarch64": ("scalar", "neon", "dotprod")}
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


class ApiBase(ctypes.Structure):
    """OrtApiBase: the two functions that every version of onnxruntime has."""

    _fields_ = [("GetApi", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)),
                ("GetVersionString", ctypes.CFUNCTYPE(ctypes.c_void_p))]


def complaint_about(version: bytes, newest_api: int = 99) -> str | None:
    """What RegisterCustomOps says of an onnxruntime that calls itself so; its functions are the installed one's."""
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"), None)
    if library is None:
        pytest.skip("this onnxruntime comes without libonnxruntime.so")
    ort = ctypes.CDLL(str(library))
    ort.OrtGetApiBase.restype = ctypes.POINTER(ApiBase)
    real = ort.OrtGetApiBase().contents
    fields, text = dict(ApiBase._fields_), ctypes.create_string_buffer(version)
    fake = ApiBase(fields["GetApi"](lambda asked: real.GetApi(asked) if asked <= newest_api else None),
                   fields["GetVersionString"](lambda: ctypes.addressof(text)))
    register = ctypes.CDLL(str(LIBRARY)).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.POINTER(ApiBase)]
    status = register(None, ctypes.byref(fake))
    if status is None:
        return None
    slots = ctypes.cast(real.GetApi(1), ctypes.POINTER(ctypes.c_void_p))
    return ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(slots[2])(status).decode()


@needs_library
@pytest.mark.parametrize("version, newest_api, message", [
    (b"1.17.3", 99, "needs onnxruntime 1.18 or a later 1.x, found onnxruntime 1.17.3"),
    (b"2.0.0", 99, "needs onnxruntime 1.18 or a later 1.x, found onnxruntime 2.0.0"),
    (b"nightly", 99, "found onnxruntime nightly"), (b"1.31.1", 17, "does not offer version 18"),
])  # fmt: skip
def test_an_onnxruntime_that_is_not_known_is_refused(version, newest_api, message):
    assert message in complaint_about(version, newest_api)


@needs_library
def test_an_instruction_set_that_is_not_here_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("VL2_CPU_ISA", "sse9")
    with pytest.raises(RuntimeException, match=f'"sse9", this processor and build have {", ".join(ISAS)}'):
        node_session("Linear", {"x": True, "weight": np.zeros(64, np.uint8)}, {"N": 1, "K": 8, "scheme": "int4"})


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm is not installed")
def test_the_library_shows_its_entry_points_only():
    shown = subprocess.run(["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in shown.splitlines() if not line.split()[-1].startswith("_Z")}
    assert names == {"RegisterCustomOps", "vl2_isa", "vl2_available_isas"}


def build_driver(folder: Path, processor: str, compiler: list[str], whole: list[str], kernels: list[str]) -> Path:
    """Compiles and links the driver; whole, kernels: flags of the operators and of the files of one instruction set."""
    objects = []
    for source in (DRIVER, *(SOURCES / f"kernels_{isa}.cc" for isa in BY_PROCESSOR[processor])):
        objects.append(str(folder / f"{source.stem}.o"))
        flags = whole if source == DRIVER else kernels
        subprocess.run([*compiler, *INCLUDES, *QUIET, *flags, "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([*compiler, *QUIET, *whole, *objects, "-o", folder / "driver"], check=True)
    return folder / "driver"


def has_sanitizers(compiler: str) -> bool:
    program = [compiler, "-x", "c++", "-", "-fsanitize=address,undefined", "-o", os.devnull]
    return subprocess.run(program, input="int main() {}", text=True, capture_output=True).returncode == 0


@pytest.mark.thorough
def test_the_operators_are_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    if platform.machine() not in BY_PROCESSOR or shutil.which("g++") is None or not has_sanitizers("g++"):
        pytest.skip("no g++ with sanitizers for this processor")
    both = ["-fsanitize=address,undefined", "-fno-sanitize-recover"]
    driver = build_driver(tmp_path, platform.machine(), ["g++"], both, ["-fsanitize=address"])
    done = subprocess.run([driver], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.thorough
def test_the_operators_agree_on_an_emulated_arm_processor(tmp_path):
    if shutil.which(CROSS_COMPILER) is None or shutil.which(EMULATOR) is None:
        pytest.skip(f"{CROSS_COMPILER} or {EMULATOR} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    driver = build_driver(tmp_path, "aarch64", [CROSS_COMPILER, "-static"], [], ["-O1"])
    done = subprocess.run([EMULATOR, driver], capture_output=True, text=True)
    assert done.returncode == 0 and "dotprod done" in done.stdout, done.stdout + done.stderr


@needs_library
def test_amx_is_used_where_the_processor_has_it():
    words = Path("/proc/cpuinfo").read_text().split() if platform.machine() == "x86_64" else []
    if not {"amx_tile", "amx_bf16", "avx512_bf16", "avx512_vnni"} <= set(words):
        pytest.skip("this processor has no AMX, so that its kernels are not run here")
    assert ISAS[-1] == "amx"


@pytest.mark.parametrize("isa", ["avx2", "amx"])
@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="no g++ for x86-64")
def test_files_of_an_instruction_set_define_no_function_that_others_might_take(isa, tmp_path):
    # A weak function compiled for AVX2 could be the one that the linker keeps for all files.
    made = tmp_path / "kernels.o"
    subprocess.run(["g++", *INCLUDES, *QUIET, "-O1", "-c", SOURCES / f"kernels_{isa}.cc", "-o", made], check=True)
    symbols = subprocess.run(["nm", made], capture_output=True, text=True, check=True).stdout
    assert not [line for line in symbols.splitlines() if " W " in line or " V " in line]

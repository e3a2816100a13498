"""Compiling the pack without CUDA's toolkit: NVRTC, a library of one wheel.

`nvidia-cuda-nvrtc-cu12==12.6.77` makes what JetPack 6.2's driver takes: sm_87 cubins and PTX 8.5.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from vl2.errors import VL2Error

_PLACES = ("nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "nvidia/cu13/lib/libnvrtc.so.13")
_SYSTEM = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def find_nvrtc() -> str | None:
    """The library of a wheel in this Python, or the system's."""
    paths = (Path(folder, place) for place in _PLACES for folder in sys.path)
    found = next((str(path) for path in paths if path.is_file()), None)
    return found or next((name for name in _SYSTEM if _loads(name)), None)


def compile_source(source: str, arch: str, options: list[str], library: str) -> tuple[bytes, str]:
    """A cubin for `sm_…`, PTX ending in NUL for `compute_…`, and the log with ptxas' figures.

    options: flags as nvcc's. Raises VL2Error with the compiler's words where it fails.
    """
    nvrtc, program = ctypes.CDLL(library), ctypes.c_void_p()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"pack.cu", 0, None, None), "begin")
    flags = [f"--gpu-architecture={arch}", "--ptxas-options=-v", *options]
    words = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    failed = nvrtc.nvrtcCompileProgram(program, len(flags), words)
    log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode(errors="replace")
    if failed:
        raise VL2Error(f"{library} failed on the kernel pack for {arch}:\n{log[-2000:]}")
    kind = "PTX" if arch.startswith("compute") else "CUBIN"
    image = _text(getattr(nvrtc, f"nvrtcGet{kind}Size"), getattr(nvrtc, f"nvrtcGet{kind}"), program)
    check(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)), "end")
    return image, log


def check(status: int, what: str) -> None:
    """Raises VL2Error on an error code of NVRTC."""
    if status:
        raise VL2Error(f"NVRTC could not {what} a compilation: error {status}")


def _text(size_of, copy, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    check(size_of(program, ctypes.byref(size)), "measure")
    held = ctypes.create_string_buffer(size.value)
    check(copy(program, held), "read")
    return held.raw


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True

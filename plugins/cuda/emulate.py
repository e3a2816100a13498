"""Runs launch plans on a CPU: the kernels' own source, compiled with g++ against emulation.h.

Every buffer lies between two pages that cannot be touched and begins as NaN; see emulation.h for what else is checked.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from vl2.errors import VL2Error
from vl2.plugins.cuda.launch import Launch, Plan
from vl2.plugins.cuda.pack import FOLDER, INCLUDES, SOURCES, cache_folder, pack_hash

# Fibers leave their stacks by longjmp, which fortified libraries take for an overflow.
_FLAGS = ("-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-w", "-ffp-contract=off")
_ORDERS = range(8)
_MACHINE = (FOLDER / "emulate.cpp", FOLDER / "emulation.h")
PACK = tuple(FOLDER.parent / name for name in SOURCES)


class Emulator:
    """The compiled emulation, of the pack or of other `sources`. Raises VL2Error without g++ or where it fails."""

    def __init__(self, cache: Path | None = None, sources: tuple[Path, ...] = PACK):
        self.library = ctypes.CDLL(str(_compiled(cache or cache_folder(), sources)))
        self.library.emulate.restype = ctypes.c_char_p
        self.library.guarded_allocate.restype = ctypes.c_void_p
        self.library.guarded_allocate.argtypes = [ctypes.c_size_t]
        self.library.guarded_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def run(self, plan: Plan, arrays: dict[str, np.ndarray], order: int = 0) -> None:
        """Runs every launch. arrays: the buffers that the plan names, C-contiguous; outputs are written in place.

        order 0 … 7: the order of lanes, warps and blocks. Raises VL2Error on whatever a GPU would not forgive.
        """
        assert order in _ORDERS
        held = {name: self._allocate(array.nbytes) for name, array in arrays.items()}
        workspace = {name: self._allocate(size) for name, size in plan.workspace.items()}
        try:
            for name, array in arrays.items():
                assert array.flags.c_contiguous, name
                ctypes.memmove(held[name][0], array.ctypes.data, array.nbytes)
            for launch in plan.launches:
                self._launch(launch, {**held, **workspace}, order)
            for name, array in arrays.items():
                ctypes.memmove(array.ctypes.data, held[name][0], array.nbytes)
        finally:
            for address, size in (*held.values(), *workspace.values()):
                self.library.guarded_free(address, size)

    def _allocate(self, size: int) -> tuple[int, int]:
        return self.library.guarded_allocate(size), size

    def _launch(self, launch: Launch, buffers: dict[str, tuple[int, int]], order: int) -> None:
        values = [_value(argument, buffers) for argument in launch.arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sizes = [(ctypes.c_uint * 3)(*three) for three in (launch.grid, launch.block)]
        wrong = self.library.emulate(launch.kernel.encode(), *sizes, launch.shared_bytes, pointers, order)
        if wrong is not None:
            raise VL2Error(f"emulated kernel failed: {wrong.decode()}")


def _value(argument: str | int | float | None, buffers: dict[str, tuple[int, int]]):
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, str):
        return ctypes.c_void_p(buffers[argument][0])
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)


def _compiled(cache: Path, sources: tuple[Path, ...]) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        raise VL2Error("the CUDA kernels are emulated with g++, which is not on this machine", "apt install g++")
    own = hashlib.sha256(b"".join(path.read_bytes() for path in (*_MACHINE, *sources)))
    own.update(repr(_FLAGS).encode())
    library = cache / f"emulation-{pack_hash()[:16]}-{own.hexdigest()[:16]}.so"
    if not library.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            whole, made = Path(work, "all.cpp"), Path(work, "made.so")
            whole.write_text("".join(f'#include "{path}"\n' for path in (_MACHINE[0], *sources)))
            command = [compiler, *_FLAGS, *INCLUDES, "-o", str(made), str(whole)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise VL2Error(f"g++ failed on the emulation:\n{done.stderr.strip()[:2000]}")
            os.replace(made, library)
    return library

"""The compiled kernels: one cubin or PTX an architecture, made by nvcc (or NVRTC) once and kept by content.

    python -m vl2.plugins.cuda.pack [--arch sm_87 …]      compile and print registers, spills and bytes of every kernel

A cubin runs on its own architecture; the PTX of `compute_80` is compiled by the driver of any GPU from 8.0 on. PTX of
CUDA 13 needs a CUDA 13 driver: JetPack 6.2 takes a cubin or the PTX 8.5 that `nvidia-cuda-nvrtc-cu12==12.6.77` writes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vl2.errors import VL2Error
from vl2.plugins.cuda import nvrtc

ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_110", "sm_120", "sm_121", "compute_80")
FOLDER = Path(__file__).parent
# Relative to plugins/, compiled together as one translation unit.
SOURCES = ("experts/routing.cu", "linear/linear.cu", "experts/decode.cu", "experts/prefill.cu",
           "attention/attention.cu", "latent_attention/latent_attention.cu")  # fmt: skip
INCLUDES = tuple(flag for name in ("cuda", "linear", "attention") for flag in ("-I", str(FOLDER.parent / name)))
FLAGS = ("-std=c++17", "-O3")
_RESOURCES = re.compile(r"Compiling entry function '(\w+)' for '\w+'.*?(\d+) bytes stack frame, (\d+) bytes spill "
                        r"stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.DOTALL)  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel: registers a thread, bytes of stack and of spills."""

    kernel: str
    registers: int
    stack_bytes: int
    spill_bytes: int


@dataclass(frozen=True)
class Pack:
    """image: a cubin or, for `compute_80`, PTX text ending in NUL; resources: empty for PTX."""

    arch: str
    image: bytes
    resources: tuple[Resources, ...]


def architecture_of(compute_capability: str) -> str:
    """Which pack a GPU takes: `sm_87` for "8.7"; PTX, which its driver compiles, where there is none of its own."""
    exact = f"sm_{compute_capability.replace('.', '')}"
    return exact if exact in ARCHITECTURES else "compute_80"


def pack_hash() -> str:
    """Of every source and flag of the compiled kernels: what they are kept by."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in (FOLDER / "device.cuh", *headers(), *(FOLDER.parent / name for name in SOURCES)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def headers() -> tuple[Path, ...]:
    """The .cuh files beside the kernels, in one order."""
    return tuple(sorted({path for name in SOURCES for path in (FOLDER.parent / name).parent.glob("*.cuh")}))


def load(arch: str, cache: Path | None = None, compiler: str | None = None) -> Pack:
    """The pack of an architecture, from the cache or compiled now; compiler: nvcc or libnvrtc.so, the first found by
    default.

    Raises VL2Error on an architecture that is not in ARCHITECTURES, without a compiler, and where it fails or spills.
    """
    if arch not in ARCHITECTURES:
        raise VL2Error(f"there is no kernel pack for `{arch}`, expected one of {', '.join(ARCHITECTURES)}",
                       "a GPU of another architecture from 8.0 on takes `compute_80`, compiled by its driver")
    image, log = _places(arch, cache or cache_folder(), compiler)
    if not (image.is_file() and log.is_file()):
        image.parent.mkdir(parents=True, exist_ok=True)
        _compile(arch, compiler or find_compiler(arch), image, log)
    resources = read_resources(log.read_text())
    for one in resources:
        if one.spill_bytes or one.stack_bytes:
            raise VL2Error(f"`{one.kernel}` has {one.spill_bytes} bytes of spills and {one.stack_bytes} of stack on "
                           f"{arch}, expected none",
                           "take the nvcc that plugins/cuda/README.md names; others allot registers otherwise")
    return Pack(arch, image.read_bytes(), resources)


def is_cached(arch: str, cache: Path | None = None) -> bool:
    """Whether `load` would compile nothing."""
    return all(path.is_file() for path in _places(arch, cache or cache_folder(), None))


def _places(arch: str, cache: Path, compiler: str | None) -> tuple[Path, Path]:
    name = f"{pack_hash()[:32]}-{arch}"
    if compiler is not None:
        name += f"-{hashlib.sha256(compiler.encode()).hexdigest()[:8]}"
    return cache / f"{name}.image", cache / f"{name}.log"


def cache_folder() -> Path:
    """Where compiled packs are kept: `vl2/cuda` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vl2" / "cuda"


def read_resources(log: str) -> tuple[Resources, ...]:
    """From the text of `ptxas -v`, in the order of names."""
    found = (
        Resources(name, int(used), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, used in _RESOURCES.findall(log)
    )
    return tuple(sorted(found, key=lambda one: one.kernel))


def find_nvcc() -> str | None:
    """nvcc on the path, in CUDA's folder, or of the wheel nvidia-cuda-nvcc in this Python."""
    wheel = Path(sys.prefix, "lib", f"python3.{sys.version_info.minor}", "site-packages/nvidia/cu13/bin/nvcc")
    places = (Path("/usr/local/cuda/bin/nvcc"), wheel)
    return shutil.which("nvcc") or next((str(path) for path in places if path.is_file()), None)


def find_compiler(arch: str) -> str:
    """nvcc, else NVRTC. Raises VL2Error where neither is on this machine."""
    found = find_nvcc() or nvrtc.find_nvrtc()
    if found is None:
        raise VL2Error(f"the CUDA kernels for {arch} are not compiled yet, and this machine has neither nvcc nor NVRTC",
                       "`pip install nvidia-cuda-nvrtc` (JetPack 6.2: `nvidia-cuda-nvrtc-cu12==12.6.77`), or install "
                       "CUDA's toolkit")
    return found


def _compile(arch: str, compiler: str, image: Path, log: Path) -> None:
    source = "".join(f'#include "{FOLDER.parent / name}"\n' for name in SOURCES)
    make = _with_nvcc if Path(compiler).name.startswith("nvcc") else _with_nvrtc
    made, words = make(source, arch, compiler)
    with tempfile.TemporaryDirectory(dir=image.parent) as work:
        Path(work, "log").write_text(words)
        Path(work, "image").write_bytes(made)
        os.replace(Path(work, "log"), log)
        os.replace(Path(work, "image"), image)


def _with_nvrtc(source: str, arch: str, library: str) -> tuple[bytes, str]:
    return nvrtc.compile_source(source, arch, [FLAGS[0], *INCLUDES], library)


def _with_nvcc(source: str, arch: str, nvcc: str) -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory() as work:
        whole, made = Path(work, "pack.cu"), Path(work, "image")
        whole.write_text(source)
        kind, end = ("-ptx", b"\0") if arch.startswith("compute") else ("-cubin", b"")
        command = [nvcc, *FLAGS, kind, f"-arch={arch}", "-Xptxas", "-v", *INCLUDES, "-o", str(made), str(whole)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise VL2Error(f"nvcc failed on the kernel pack for {arch}:\n{done.stderr.strip()[-2000:]}",
                           f"CUDA 12.8 knows sm_120, CUDA 13 sm_110 and sm_121; command: `{' '.join(command)}`")
        return made.read_bytes() + end, done.stderr


def main(arguments: list[str]) -> None:
    """Compiles the packs of the architectures named (all by default) and prints a table."""
    wanted = [name for name in arguments if not name.startswith("--")] or ARCHITECTURES
    packs = [load(arch) for arch in wanted]
    print(f"{'kernel':34}", *(f"{pack.arch:>8}" for pack in packs if pack.resources))
    columns = [{one.kernel: one.registers for one in pack.resources} for pack in packs if pack.resources]
    for name in columns[0] if columns else ():
        print(f"{name:34}", *(f"{column[name]:8}" for column in columns))
    print(f"{'image, bytes':34}", *(f"{len(pack.image):8}" for pack in packs))


if __name__ == "__main__":
    main(sys.argv[1:])

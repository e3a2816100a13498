"""The C++ host of the plugins, for programs without Python: one shared library with kernels inside, made on the device.

    python -m vl2.plugins.tensorrt.host sm_87 --out libvl2_plugins.so [--headers FOLDER]

TensorRT loads it (`IPluginRegistry::loadLibrary`, `trtexec --dynamicPlugins=libvl2_plugins.so`). Its sources, host/ and
the plans of ../cuda, link neither TensorRT nor CUDA; NvInfer.h is the installed TensorRT's own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vl2.errors import VL2Error
from vl2.plugins.cuda.pack import load
from vl2.plugins.tensorrt.sources import plugin_hash

SOURCE = Path(__file__).parent / "host" / "plugin.cpp"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-deprecated-declarations")
_TENSORRT = ("/usr/include", "/usr/include/aarch64-linux-gnu", "/usr/include/x86_64-linux-gnu",
             "/usr/local/tensorrt/include", "/usr/src/tensorrt/include")  # fmt: skip
_CUDA = ("/usr/local/cuda/include", "/usr/include", *(str(Path(folder, "nvidia/cu13/include")) for folder in sys.path))


def compile_host(out: Path, images: Mapping[str, Path], headers: Path, compiler: str = "g++") -> None:
    """Compiles the library. images: files with the kernels of an architecture, by its name; headers: the folder of
    NvInfer.h. Raises VL2Error without the compiler and with its words where it fails."""
    if shutil.which(compiler) is None:
        raise VL2Error(f"the C++ host is compiled with {compiler}, which is not on this machine",
                       "sudo apt install g++")  # fmt: skip
    folders = [str(headers), *(folder for folder in _CUDA if Path(folder, "cuda_runtime_api.h").is_file())]
    with tempfile.TemporaryDirectory(dir=out.resolve().parent) as work:
        table, made = Path(work, "images.cpp"), Path(work, out.name)
        table.write_text(image_table(images))
        command = [compiler, *FLAGS, f'-DVL2_PLUGIN_HASH="{plugin_hash()}"', "-I", str(SOURCE.parent),
                   *(flag for folder in folders for flag in ("-I", folder)), str(SOURCE), str(table), "-o", str(made),
                   "-ldl"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise VL2Error(f"{compiler} failed on the C++ host:\n{done.stderr.strip()[:2000]}",
                           "it needs the headers of TensorRT 10.3 or later (libnvinfer-headers-dev) and of CUDA's "
                           f"runtime (cuda-cudart-dev); command: `{' '.join(command)}`")  # fmt: skip
        os.replace(made, out)


def image_table(images: Mapping[str, Path]) -> str:
    """C++ that puts the files into the library as `vl2::IMAGES`."""
    parts, rows = ['#include "driver.h"\n'], []
    for arch, path in images.items():
        parts.append(f'asm(".section .rodata\\n.balign 16\\n.hidden image_{arch}\\n.global image_{arch}\\n'
                     f'image_{arch}:\\n.incbin \\"{path.resolve()}\\"\\n.previous\\n");\n'
                     f'extern "C" __attribute__((visibility("hidden"))) const unsigned char image_{arch}[];\n')
        rows.append(f'{{"{arch}", image_{arch}}}, ')
    return "".join(parts) + f"const vl2::Image vl2::IMAGES[] = {{{''.join(rows)}{{nullptr, nullptr}}}};\n"


def find_headers(given: str | None = None) -> Path:
    """The folder with NvInfer.h. Raises VL2Error where none has it."""
    places = (given,) if given else _TENSORRT
    found = next((Path(place) for place in places if Path(place, "NvInfer.h").is_file()), None)
    if found is None:
        raise VL2Error(f"there is no NvInfer.h in {', '.join(places)}",
                       "install TensorRT's headers (`sudo apt install libnvinfer-headers-dev` on a Jetson), or name "
                       "their folder with --headers")
    return found


def build_host(arch: str, out: Path, headers: str | None = None) -> None:
    """Compiles kernels and host for one GPU architecture. Raises VL2Error that says what is missing."""
    place = find_headers(headers)
    with tempfile.TemporaryDirectory() as work:
        image = Path(work, arch)
        image.write_bytes(load(arch).image)
        compile_host(out, {arch: image}, place)


def main(words: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vl2.plugins.tensorrt.host", description=__doc__.split("\n")[0])
    parser.add_argument("arch", help="of the GPU: sm_87 (Orin), sm_110 (Thor), sm_86, sm_89, sm_120 …, or compute_80")
    parser.add_argument("--out", type=Path, default=Path("libvl2_plugins.so"))
    parser.add_argument("--headers", help="folder of NvInfer.h, where it is in none of the usual ones")
    given = parser.parse_args(words)
    try:
        build_host(given.arch, given.out, given.headers)
    except VL2Error as error:
        print(f"{error.message}\nhint: {error.hint}", file=sys.stderr)
        return 1
    print(f"{given.out}: {given.out.stat().st_size} bytes, plugins {plugin_hash()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

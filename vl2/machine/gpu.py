"""The GPU below onnxruntime: driver, device, libraries, TensorRT."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from vl2.machine.check import FAILED, MISSING, OK, Check
from vl2.machine.cuda_driver import DriverError, driver_version, find_gpus
from vl2.machine.interpreter import attempt
from vl2.machine.jetson import bindings_package, is_jetson, nvrtc_package

_NVRTC = "'nvidia-cuda-nvrtc>=13'"
_PCI = Path("/sys/bus/pci/devices")
_NVIDIA = "0x10de"
# Where the wheels of NVIDIA put what onnxruntime-gpu[cuda,cudnn] needs, beside the system's folders.
_LIBRARIES = {"cuDNN": ("cudnn", "libcudnn.so.9"), "cuBLAS": ("cublas", "libcublasLt.so.13", "libcublasLt.so.12")}
_TENSORRTS = {"tensorrt": ("TensorRT", "pip install tensorrt --extra-index-url https://pypi.nvidia.com"),
              "tensorrt_rtx": ("TensorRT-RTX", "pip install tensorrt-rtx")}


def check_gpu() -> Iterator[Check]:
    """Driver and devices; libraries only where there is a device."""
    try:
        gpus, cuda = find_gpus(), driver_version()
    except DriverError as error:
        here = gpu_is_possible()
        found = "and an NVIDIA device is on the bus" if here else "and no NVIDIA device is on the bus"
        mend = "sudo ubuntu-drivers install (Debian: sudo apt install nvidia-driver), then restart" if here else None
        yield Check("GPU", "CUDA driver", FAILED if here else MISSING, f"{error}, {found}", mend)
        return
    for gpu in gpus:
        kind = "shared with the system" if gpu.integrated else "of its own"
        size = f"{gpu.memory_bytes / 1e9:.1f} GB {kind}, {gpu.bandwidth / 1e9:.0f} GB/s by its clocks"
        yield Check("GPU", gpu.name, OK, f"compute capability {gpu.compute_capability}, {size}; CUDA {cuda} at most")
    if not gpus:
        yield Check("GPU", "CUDA device", FAILED, "the driver finds no device", "nvidia-smi says more")
    for name, (package, *files) in _LIBRARIES.items():
        found = next((file for file in files if _loads(package, file)), None)
        mend = "sudo apt install nvidia-jetpack" if is_jetson() else "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        yield Check("GPU", name, OK if found else MISSING, found or f"none of {', '.join(files)} loads",
                    None if found else mend)


def check_tensorrt() -> Iterator[Check]:
    """Makes a builder with each TensorRT that is installed, imports cuda-bindings, looks for a compiler of our kernels:
    what engines need."""
    for module, (name, mend) in _TENSORRTS.items():
        if importlib.util.find_spec(module) is None:
            mend = "sudo apt install nvidia-jetpack" if is_jetson() and module == "tensorrt" else mend
            yield Check("engines", name, MISSING, "not installed; only engines need it",
                        mend if gpu_is_possible() else None)
            continue
        answer, error = attempt(f"import {module} as trt; builder = trt.Builder(trt.Logger(trt.Logger.ERROR)); "
                                "assert builder is not None; print(trt.__version__)")
        yield Check("engines", name, FAILED if error else OK, error or f"{answer}, makes a builder",
                    mend if error else None)
    answer, error = attempt("from importlib.metadata import version; from cuda.bindings import driver; "
                            "print(version('cuda-bindings'))")
    yield Check("engines", "cuda-bindings", MISSING if error else OK, error or f"{answer}, runs engines",
                f"pip install {bindings_package() if is_jetson() else 'cuda-bindings'}"
                if error and gpu_is_possible() else None)
    yield _check_kernels()


def _check_kernels() -> Check:
    """Whether the plugins' kernels can be compiled, or are already for every GPU here (without a driver: for all)."""
    from vl2.plugins.cuda import nvrtc, pack

    try:
        wanted = {pack.architecture_of(gpu.compute_capability) for gpu in find_gpus()}
    except DriverError:
        wanted = set()
    if found := pack.find_nvcc() or nvrtc.find_nvrtc():
        return Check("engines", "CUDA kernels", OK, f"{found} compiles them when engines are first run", None)
    if all(map(pack.is_cached, wanted or pack.ARCHITECTURES)):
        return Check("engines", "CUDA kernels", OK, f"compiled already, kept in {pack.cache_folder()}", None)
    mend = f"pip install {nvrtc_package() if is_jetson() else _NVRTC}"
    return Check("engines", "CUDA kernels", MISSING, "neither nvcc nor NVRTC compiles them; only engines need it",
                 mend if gpu_is_possible() else None)


def gpu_is_possible() -> bool:
    """Whether there is a GPU of NVIDIA on the PCI bus or in a Jetson, with or without a driver."""
    if is_jetson():
        return True
    for device in _PCI.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == _NVIDIA and kind.startswith("0x03"):
            return True
    return False


def _loads(package: str, file: str) -> bool:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(path) for path in spec.submodule_search_locations or ()] if spec else []
    # nvidia/cudnn/lib and, from CUDA 13 on, nvidia/cu13/lib
    found = [path for folder in folders for part in (package, "cu1*") for path in folder.glob(f"{part}/lib/{file}")]
    for name in (*map(str, found), file):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False

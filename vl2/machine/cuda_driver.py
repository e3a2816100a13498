"""GPUs as the CUDA driver describes them. Only libcuda is asked, which comes with the driver; no toolkit is needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
# cuda.h, CUdevice_attribute
_CLOCK_KHZ, _PROCESSORS, _INTEGRATED, _MEMORY_CLOCK_KHZ, _BUS_BITS, _MAJOR, _MINOR = 13, 16, 18, 36, 37, 75, 76
# Dense float16 operations a cycle and multiprocessor with float32 accumulation, by compute capability (white papers).
_FP16_A_CYCLE = {"8.0": 2048, "8.7": 2048, "9.0": 4096, "10.0": 8192, "11.0": 8192}
_FP16_A_CYCLE_GEFORCE = 512


@dataclass(frozen=True)
class Gpu:
    """Bandwidth and rate follow from clocks and widths; integrated: its memory is the system's."""

    name: str
    compute_capability: str
    memory_bytes: int
    bandwidth: float
    fp16_rate: float
    integrated: bool


class DriverError(Exception):
    """Why there is no GPU to be had, for a person."""


def find_gpus() -> list[Gpu]:
    """The GPUs of this machine. Raises DriverError when there is no driver or it does not start."""
    driver = _driver()
    count = ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    return [_gpu(driver, ordinal) for ordinal in range(count.value)]


def driver_version() -> str:
    """The newest CUDA that the driver takes, such as "13.0"."""
    version = ctypes.c_int()
    _call(_driver(), "cuDriverGetVersion", ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _driver() -> ctypes.CDLL:
    for name in _LIBRARIES:
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        _call(driver, "cuInit", 0)
        return driver
    raise DriverError("there is no CUDA driver (libcuda.so.1)")


def _call(driver: ctypes.CDLL, name: str, *arguments: object) -> None:
    status = getattr(driver, name)(*arguments)
    if status:
        raise DriverError(f"the CUDA driver answers {name} with error {status}")


def _gpu(driver: ctypes.CDLL, ordinal: int) -> Gpu:
    device, name, size = ctypes.c_int(), ctypes.create_string_buffer(128), ctypes.c_size_t()
    _call(driver, "cuDeviceGet", ctypes.byref(device), ordinal)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(size), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    capability = f"{attribute(_MAJOR)}.{attribute(_MINOR)}"
    cycle = attribute(_PROCESSORS) * _FP16_A_CYCLE.get(capability, _FP16_A_CYCLE_GEFORCE)
    return Gpu(name.value.decode(), capability, size.value,
               2 * attribute(_MEMORY_CLOCK_KHZ) * 1e3 * attribute(_BUS_BITS) / 8,  # double data rate
               attribute(_CLOCK_KHZ) * 1e3 * cycle, bool(attribute(_INTEGRATED)))

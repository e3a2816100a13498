"""The driver's answers become a GPU's facts; a fake libcuda compiled here gives them."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from vl2.errors import VL2Error
from vl2.machine import cuda_driver
from vl2.planning.local import local_target

# An RTX 4060: 24 multiprocessors at 2.46 GHz, 8.5 GHz GDDR6 over 128 bits, data sheet 272 GB/s and 30.2 TFLOPS.
SOURCE = """
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int* count) { *count = COUNT; return 0; }
int cuDriverGetVersion(int* version) { *version = 13010; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "GeForce RTX 4060", size); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = 8585740288ul; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 13: *value = 2460000; return 0;
    case 16: *value = 24; return 0;
    case 18: *value = 0; return 0;
    case 36: *value = 8501000; return 0;
    case 37: *value = 128; return 0;
    case 75: *value = 8; return 0;
    case 76: *value = 9; return 0;
  }
  return 1;
}
"""


def use_driver(monkeypatch, folder: Path, init: int = 0, count: int = 1) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("there is no C compiler")
    (folder / "cuda.c").write_text(SOURCE)
    subprocess.run(["gcc", "-shared", "-fPIC", f"-DINIT={init}", f"-DCOUNT={count}", "-o", folder / "libcuda.so",
                    folder / "cuda.c"], check=True)
    monkeypatch.setattr(cuda_driver, "_LIBRARIES", (str(folder / "libcuda.so"),))


def test_a_gpu_has_the_bandwidth_and_rate_of_its_data_sheet(monkeypatch, tmp_path: Path) -> None:
    use_driver(monkeypatch, tmp_path)
    (gpu,) = cuda_driver.find_gpus()
    assert (gpu.name, gpu.compute_capability, gpu.integrated) == ("GeForce RTX 4060", "8.9", False)
    assert gpu.bandwidth == pytest.approx(272e9, rel=0.01) and gpu.fp16_rate == pytest.approx(30.2e12, rel=0.01)
    assert cuda_driver.driver_version() == "13.1"
    target = local_target("local-gpu")
    assert (target.memory, target.backends, target.memory_gib) == ("dedicated", ("cuda", "engine"), 8.0)


@pytest.mark.parametrize("init, count, told", [(100, 1, "cuInit with error 100"), (0, 0, "finds no GPU")])
def test_a_driver_without_devices_or_that_does_not_start_is_told(monkeypatch, tmp_path, init, count, told) -> None:
    use_driver(monkeypatch, tmp_path, init, count)
    with pytest.raises(VL2Error, match=told):
        local_target("local-gpu")


def test_no_driver_at_all_is_told(monkeypatch) -> None:
    monkeypatch.setattr(cuda_driver, "_LIBRARIES", ("libnothing.so",))
    with pytest.raises(cuda_driver.DriverError, match="no CUDA driver"):
        cuda_driver.find_gpus()
    assert ctypes.CDLL(None)

"""What the runtime calls exists in cuda-bindings and takes what it is given; without a driver no call does more."""

from __future__ import annotations

import ctypes
import gc
import threading

import numpy as np
import pytest

from tests.runtime.engines.fake_cuda import FakeDriver
from vl2.errors import VL2Error
from vl2.plugins.cuda.launch import Launch
from vl2.plugins.tensorrt.launcher import arguments
from vl2.runtime.engines.device import Device
from vl2.runtime.engines.memory import DeviceArray, DeviceMemory, DeviceWeights


class Recorder:
    """A driver that remembers one set of arguments for every function."""

    def __init__(self):
        self.driver, self.given = FakeDriver(), {}

    def __getattr__(self, name: str):
        found = getattr(self.driver, name)
        return (lambda *given: (self.given.setdefault(name, given), found(*given))[1]) if name[:3] != "CUd" else found


def exercised() -> dict[str, tuple]:
    """Every call of a Device, with its arguments."""
    recorder = Recorder()
    recorder.CUstreamCaptureMode = FakeDriver.CUstreamCaptureMode
    device = Device(recorder)
    address, array = device.allocate(64), np.zeros(16, np.float32)
    device.put(address, array)
    device.copy(address, address, 32)
    device.get(array, address)
    device.synchronize()
    graph = device.capture(lambda: None)
    device.launch(graph)
    device.drop(graph)
    device.free(address)
    device.free_bytes()
    return recorder.given


# Of the launcher of the plugins' kernels, which needs a compiled pack.
LAUNCHING = ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel")


@pytest.mark.parametrize("name", sorted({*exercised(), *LAUNCHING}))
def test_a_call_is_one_that_cuda_bindings_takes(name: str) -> None:
    """It fails for want of a driver, after the arguments were taken and not because of them."""
    driver = pytest.importorskip("cuda.bindings.driver")
    try:
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("a CUDA driver is here: such addresses would harm")
    except OSError:
        pass
    real = {"cuCtxSetCurrent": (driver.CUcontext(),), "cuGraphInstantiate": (driver.CUgraph(), 0),
            "cuGraphDestroy": (driver.CUgraph(),), "cuGraphExecDestroy": (driver.CUgraphExec(),),
            "cuGraphLaunch": (driver.CUgraphExec(), 7), "cuDeviceGetName": (128, driver.CUdevice(0)),
            "cuDevicePrimaryCtxRetain": (driver.CUdevice(0),),
            "cuDeviceGetAttribute": (driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED, driver.CUdevice(0)),
            "cuModuleLoadData": (b"image",), "cuModuleGetFunction": (driver.CUmodule(), b"name"),
            "cuFuncSetAttribute": (driver.CUfunction(), driver.CUfunction_attribute(8), 64 << 10),
            "cuLaunchKernel": (driver.CUfunction(), 4, 2, 1, 128, 1, 1, 0, 7,
                               arguments(Launch("k", (4, 2, 1), (128, 1, 1), 0, ("x", None, 7, 0.5)), {"x": 256}), 0),
            "cuStreamBeginCapture": (7, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)}  # fmt: skip
    with pytest.raises(RuntimeError, match="cuda"):
        getattr(driver, name)(*(real.get(name) or exercised()[name]))


def test_memory_is_given_back_with_the_last_reference() -> None:
    driver = FakeDriver()
    array = DeviceArray(Device(driver), (2, 3), np.float16)
    assert (array.nbytes, driver.held_bytes) == (12, 12)
    del array
    gc.collect()
    assert driver.held_bytes == 0


def test_an_empty_buffer_takes_nothing() -> None:
    driver = FakeDriver()
    memory = DeviceMemory(Device(driver))
    memory.copy(memory.allocate((1, 64, 2), np.float16), memory.allocate((1, 0, 2), np.float16), 0)
    assert "cuMemcpyDtoDAsync" not in driver.calls


def test_a_failure_in_the_captured_part_ends_the_capture() -> None:
    driver = FakeDriver()
    device = Device(driver)

    def fails() -> None:
        raise VL2Error("no")

    with pytest.raises(VL2Error, match="no"):
        device.capture(fails)
    assert not driver.capturing


def test_every_thread_makes_the_device_its_own_once() -> None:
    driver = FakeDriver()
    device = Device(driver)
    device.synchronize()
    threads = [threading.Thread(target=device.synchronize) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert driver.calls["cuCtxSetCurrent"] == 3


def test_weights_lie_aligned_and_whole_whatever_their_sizes(tmp_path, monkeypatch) -> None:
    from tests.runtime.small_bundle import save_tensors

    monkeypatch.setattr("vl2.runtime.engines.memory._PIECE_BYTES", 100)
    random, driver = np.random.default_rng(0), FakeDriver()
    tensors = {f"w{size}": random.normal(size=size).astype(np.float32) for size in (1, 77, 64, 300)}
    tensors["empty"] = np.zeros(0, np.float32)
    save_tensors(tmp_path / "w.safetensors", tensors)
    weights = DeviceWeights(Device(driver), tmp_path / "w.safetensors")
    for name, array in tensors.items():
        assert weights.addresses[name] % 256 == 0
        if array.size:
            np.testing.assert_array_equal(driver.array(weights.addresses[name], array.shape, "f4"), array)

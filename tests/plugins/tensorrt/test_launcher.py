"""The host runs a plan's launches as they stand: kernels, grids, addresses. A recorder stands for the driver."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from vl2.errors import VL2Error
from vl2.plugins.cuda.launch import Launch, Plan
from vl2.plugins.tensorrt import launcher
from vl2.plugins.tensorrt.launcher import Launcher

PLAN = Plan((Launch("first", (4, 2, 1), (128, 1, 1), 0, ("x", "weight", None, "idx", 7, 0.5)),
             Launch("second", (1, 1, 1), (64, 1, 1), 64 << 10, ("partial", "y", -1))),
            {"idx": 40, "partial": 1000})  # fmt: skip


class Recorder:
    """Stands for `cuda.bindings.driver`."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, status: int = 0):
        self.calls, self.status = [], status

    def cuModuleLoadData(self, image):
        return 0, "module"

    def cuModuleGetFunction(self, module, name):
        return 0, f"{module}.{name.decode()}"

    def cuFuncSetAttribute(self, kernel, attribute, value):
        self.calls.append((kernel, attribute, value))
        return (0,)

    def cuLaunchKernel(self, *given):
        self.calls.append(given)
        return (self.status,)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launcher, "load", lambda arch: SimpleNamespace(image=b"cubin"))
    return lambda driver: Launcher(driver, "sm_86")


def test_launches_go_out_in_order_with_addresses_and_scalars(started) -> None:
    driver = Recorder()
    started(driver).run(PLAN, {"x": 1000, "weight": 2000, "y": 3000}, workspace=4096, stream=9)
    first, allowed, second = driver.calls
    assert first[:9] == ("module.first", 4, 2, 1, 128, 1, 1, 0, 9)
    # scratch buffers lie in the workspace, each at a multiple of 256
    assert first[9] == ((1000, 2000, 0, 4096, 7, 0.5), (*[ctypes.c_void_p] * 4, ctypes.c_int, ctypes.c_float))
    assert allowed == ("module.second", 8, 64 << 10)
    assert second[9][0] == (4096 + 256, 3000, -1)


def test_a_failed_launch_names_the_call_and_its_status(started) -> None:
    with pytest.raises(VL2Error, match="cuLaunchKernel failed: 700"):
        started(Recorder(700)).run(PLAN, {"x": 1, "weight": 2, "y": 3}, 0, 0)

"""Runs launch plans on the current CUDA device through cuda-bindings: the default host of the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from vl2.errors import VL2Error
from vl2.plugins.cuda.launch import Launch, Plan, workspace_offsets
from vl2.plugins.cuda.pack import architecture_of, load

# Beyond this a kernel has to be allowed its dynamic shared memory.
_PLAIN_SHARED_BYTES = 48 << 10


class Launcher:
    """The kernels of one device. driver: the module `cuda.bindings.driver`, or what stands for it in a test."""

    def __init__(self, driver: Any, architecture: str):
        self._driver = driver
        image = load(architecture).image
        self._module = self._call("cuModuleLoadData", image)
        self._kernels: dict[str, Any] = {}

    def run(self, plan: Plan, buffers: Mapping[str, int], workspace: int, stream: int) -> None:
        """Puts a plan's kernels on a stream. buffers: device addresses by name; workspace: of the plan's scratch."""
        offsets = workspace_offsets(plan)
        addresses = {**buffers, **{name: workspace + offset for name, offset in offsets.items()}}
        for launch in plan.launches:
            values, types = arguments(launch, addresses)
            self._call("cuLaunchKernel", self._kernel(launch), *launch.grid, *launch.block, launch.shared_bytes,
                       stream, (values, types), 0)  # fmt: skip

    def _kernel(self, launch: Launch) -> Any:
        if launch.kernel not in self._kernels:
            kernel = self._call("cuModuleGetFunction", self._module, launch.kernel.encode())
            self._kernels[launch.kernel] = kernel
        kernel = self._kernels[launch.kernel]
        if launch.shared_bytes > _PLAIN_SHARED_BYTES:
            name = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", kernel, name, launch.shared_bytes)
        return kernel

    def _call(self, name: str, *given: Any) -> Any:
        return call(self._driver, name, *given)


def arguments(launch: Launch, addresses: Mapping[str, int]) -> tuple[tuple, tuple]:
    """Values and C types of a kernel's parameters, as cuLaunchKernel takes them."""
    values, types = [], []
    for argument in launch.arguments:
        if argument is None or isinstance(argument, str):
            values.append(0 if argument is None else addresses[argument])
            types.append(ctypes.c_void_p)
        else:
            values.append(argument)
            types.append(ctypes.c_float if isinstance(argument, float) else ctypes.c_int)
    return tuple(values), tuple(types)


def call(driver: Any, name: str, *given: Any) -> Any:
    """A call of the driver; its result beside the status. Raises VL2Error naming call and status."""
    status, *results = getattr(driver, name)(*given)
    if int(status):
        raise VL2Error(f"{name} failed: {status}", "`vl2 doctor` says whether driver and kernels fit this GPU")
    return results[0] if results else None


@lru_cache(maxsize=8)
def launcher_of(device: int) -> Launcher:
    """The launcher of a CUDA device by its number; kernels are compiled once a machine and kept."""
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute
    major, minor = (call(driver, "cuDeviceGetAttribute", which, device) for which in (
        attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR))
    return Launcher(driver, architecture_of(f"{major}.{minor}"))


def current_launcher() -> Launcher:
    """Of the device that the calling thread's context belongs to."""
    from cuda.bindings import driver

    return launcher_of(int(call(driver, "cuCtxGetDevice")))

"""The one seam to CUDA: memory, copies, a stream and its graphs of one device, through the driver's own functions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from vl2 import memory
from vl2.errors import VL2Error
from vl2.plugins.tensorrt.launcher import call

_INSTALL = "pip install cuda-bindings (JetPack 6: 'cuda-bindings==12.*')"
_NON_BLOCKING = 1
_NAME_BYTES = 128


def open_device() -> Device:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves. Raises VL2Error where there is none to be had."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise VL2Error(f"cuda-bindings cannot be imported: {error}", _INSTALL) from error
    return Device(driver)


class Device:
    """A GPU, one stream on it, and what is done there in order; any thread may call.

    driver: the module `cuda.bindings.driver`, or what stands for it in a test. name, compute_capability: such as "8.9";
    integrated: whether its memory is the system's; stream: its handle; lock: to be held over calls that belong
    together. Raises VL2Error where the driver refuses.
    """

    def __init__(self, driver: Any, ordinal: int = 0):
        self._driver, self.ordinal, self.lock = driver, ordinal, threading.RLock()
        self._thread = threading.local()
        try:
            call(driver, "cuInit", 0)
        except RuntimeError as error:  # cuda-bindings' own, for a library that is not there
            raise VL2Error(f"there is no CUDA driver: {error}",
                           "`vl2 doctor` says what is missing; without a GPU export the checkpoint without "
                           "--lowering trt") from error
        self._device = call(driver, "cuDeviceGet", ordinal)
        self._context = call(driver, "cuDevicePrimaryCtxRetain", self._device)
        major, minor = (self._attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
        self.compute_capability = f"{major}.{minor}"
        self.name = self._call("cuDeviceGetName", _NAME_BYTES, self._device).rstrip(b"\0").decode(errors="replace")
        self.integrated = bool(self._attribute("INTEGRATED"))
        self.stream = int(self._call("cuStreamCreate", _NON_BLOCKING))

    def activate(self) -> None:
        """Makes this device current in the calling thread, as TensorRT and the kernels expect it."""
        if not getattr(self._thread, "active", False):
            call(self._driver, "cuCtxSetCurrent", self._context)
            self._thread.active = True

    def free_bytes(self) -> float:
        """Memory that can still be had: the GPU's own, or the system's where they share it."""
        if self.integrated:
            # the driver counts the page cache as used there, which holds the bundle itself
            return memory.available_bytes()
        return int(self._call("cuMemGetInfo"))

    def allocate(self, size: int) -> int:
        """The address of `size` bytes, a multiple of 256; not cleared. Raises VL2Error where there is no room."""
        try:
            return int(self._call("cuMemAlloc", size))
        except VL2Error as error:
            free = self.free_bytes() / 1e9
            raise VL2Error(f"the GPU gives no {size / 1e9:.2f} GB of memory, {free:.2f} GB are free",
                           "end other programs, ask shorter, or build engines for a shorter --context") from error

    def free(self, address: int) -> None:
        """Gives memory back."""
        self._call("cuMemFree", address)

    def put(self, address: int, array: np.ndarray) -> None:
        """Copies a contiguous array to the device, on the stream: it has to stay as it is until `synchronize`."""
        assert array.flags.c_contiguous, "only whole arrays are copied"
        if array.nbytes:
            self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, self.stream)

    def get(self, array: np.ndarray, address: int) -> None:
        """Copies from the device into a contiguous array, on the stream: it is there after `synchronize`."""
        assert array.flags.c_contiguous, "only whole arrays are copied"
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self.stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copies within the device, on the stream."""
        if size:
            self._call("cuMemcpyDtoDAsync", target, source, size, self.stream)

    def synchronize(self) -> None:
        """Waits for all that is on the stream."""
        self._call("cuStreamSynchronize", self.stream)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """A graph of what `enqueue` puts on the stream, which is not run now. Raises VL2Error where that cannot be."""
        # relaxed: other calls that plugins and Python's garbage collector make in between are none of the graph's
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._call("cuStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
        except BaseException:
            self._driver.cuStreamEndCapture(self.stream)
            raise
        graph = self._call("cuStreamEndCapture", self.stream)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        """Runs a captured graph, on the stream."""
        self._call("cuGraphLaunch", graph, self.stream)

    def drop(self, graph: Any) -> None:
        """Gives a captured graph back."""
        self._call("cuGraphExecDestroy", graph)

    def _attribute(self, name: str) -> int:
        which = getattr(self._driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._call("cuDeviceGetAttribute", which, self._device))

    def _call(self, name: str, *given: Any) -> Any:
        self.activate()
        return call(self._driver, name, *given)

"""What stands for `cuda.bindings.driver`: memory of the host, kernels of the emulation, graphs that replay calls."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

from vl2.plugins.cuda.emulate import Emulator

_PLAIN_SHARED_BYTES = 48 << 10


class EmulatedDriver:
    """The calls that the project makes, each giving a status and its results. `live`: addresses not freed."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=9,
                                         CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=0)  # fmt: skip
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, emulator: Emulator):
        self.library, self.live, self.allowed, self.captured, self.launches = emulator.library, {}, {}, None, 0
        for name in ("cuInit", "cuCtxSetCurrent", "cuStreamSynchronize", "cuEventRecord", "cuEventSynchronize",
                     "cuGraphExecDestroy"):  # fmt: skip
            setattr(self, name, lambda *_: (0,))
        for name in ("cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuEventCreate", "cuModuleLoadData"):
            setattr(self, name, lambda *_: (0, 0))

    def cuDeviceGetAttribute(self, attribute, device):
        return 0, attribute

    def cuDeviceGetName(self, length, device):
        return 0, b"emulated\0\0"

    def cuModuleGetFunction(self, module, name):
        return 0, name

    def cuFuncSetAttribute(self, kernel, attribute, value):
        self.allowed[kernel] = value
        return (0,)

    def cuMemAlloc(self, size):
        address = self.library.guarded_allocate(size)
        self.live[address] = size
        return 0, address

    def cuMemFree(self, address):
        self.library.guarded_free(address, self.live.pop(address))
        return (0,)

    def cuMemcpyHtoD(self, to, source, size):
        assert size <= self.live[to]
        ctypes.memmove(to, source, size)
        return (0,)

    def cuMemcpyDtoH(self, to, source, size):
        assert size <= self.live[source]
        ctypes.memmove(to, source, size)
        return (0,)

    def cuMemcpyDtoDAsync(self, to, source, size, stream):
        assert size <= min(self.live[to], self.live[source])
        return (0,)

    def cuMemsetD8(self, address, value, size):
        ctypes.memset(address, value, size)
        return (0,)

    def cuStreamBeginCapture(self, stream, mode):
        self.captured = []
        return (0,)

    def cuStreamEndCapture(self, stream):
        graph, self.captured = self.captured, None
        return 0, graph

    def cuGraphInstantiate(self, graph, flags):
        return 0, graph

    def cuGraphLaunch(self, graph, stream):
        for given in graph:
            self._run(*given)
        return (0,)

    def cuEventElapsedTime(self, start, end):
        return 0, 2.0

    def cuLaunchKernel(self, kernel, *given):
        *sizes, stream, parameters, extra = given
        if sizes[6] > _PLAIN_SHARED_BYTES:
            assert self.allowed[kernel] >= sizes[6]
        if self.captured is None:
            self._run(kernel, sizes, parameters)
        else:
            self.captured.append((kernel, sizes, parameters))
        return (0,)

    def _run(self, kernel, sizes, parameters) -> None:
        self.launches += 1
        held = [kind(value) for value, kind in zip(*parameters, strict=True)]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(one) for one in held))
        grid, block = ((ctypes.c_uint * 3)(*sizes[first : first + 3]) for first in (0, 3))
        wrong = self.library.emulate(kernel, grid, block, sizes[6], pointers, 0)
        assert wrong is None, wrong

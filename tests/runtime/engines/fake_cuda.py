"""Stands for `cuda.bindings.driver`: device memory is memory of this process at real addresses, a stream runs at once.

While a stream is captured nothing runs; a graph runs what was put on it. Memory that was given back is poisoned, and
whoever uses an address that was never given, or no longer is, fails.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

_ALIGNMENT = 256
_OUT_OF_MEMORY, _CAPTURE_REFUSED = 2, 901


class FakeDriver:
    """size_bytes: of its memory; integrated: 1 where that is the system's. calls: how often each function was called;
    refuse_capture: ends captures with an error, as an operation does that cannot be captured."""

    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
                                         CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
                                         CU_DEVICE_ATTRIBUTE_INTEGRATED="integrated")  # fmt: skip
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)

    def __init__(self, capability: tuple[int, int] = (8, 9), size_bytes: int = 1 << 30):
        self.capability, self.size_bytes, self.refuse_capture = capability, size_bytes, False
        self.integrated = 0
        self.calls: dict[str, int] = {}
        self._blocks: dict[int, np.ndarray] = {}
        self._captured: list[Callable[[], None]] | None = None

    def __getattribute__(self, name: str):
        if name.startswith("cu"):
            calls = object.__getattribute__(self, "calls")
            calls[name] = calls.get(name, 0) + 1
        return object.__getattribute__(self, name)

    @property
    def held_bytes(self) -> int:
        """Of all blocks that were not given back."""
        return sum(len(block) - _ALIGNMENT for block in self._blocks.values())

    def array(self, address: int, shape: tuple[int, ...], dtype: np.dtype | str) -> np.ndarray:
        """What lies at an address, writable."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        assert any(start <= address and address + size <= start + len(block) - _ALIGNMENT
                   for start, block in self._blocks.items()), f"{size} bytes at {address:#x} are nobody's"  # fmt: skip
        return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)

    def enqueue(self, operation: Callable[[], None]) -> None:
        """Puts an operation on the stream."""
        if self._captured is None:
            operation()
        else:
            self._captured.append(operation)

    @property
    def capturing(self) -> bool:
        """Whether the stream is captured now."""
        return self._captured is not None

    def cuInit(self, flags):
        return (0,)

    def cuDeviceGet(self, ordinal):
        return 0, ordinal

    def cuDevicePrimaryCtxRetain(self, device):
        return 0, "context"

    def cuCtxSetCurrent(self, context):
        return (0,)

    def cuDeviceGetAttribute(self, which, device):
        return 0, {"major": self.capability[0], "minor": self.capability[1], "integrated": self.integrated}[which]

    def cuDeviceGetName(self, size, device):
        return 0, b"a fake GPU".ljust(size, b"\0")

    def cuStreamCreate(self, flags):
        return 0, 7

    def cuMemGetInfo(self):
        return 0, self.size_bytes - self.held_bytes, self.size_bytes

    def cuMemAlloc(self, size):
        assert size > 0, "CUDA gives no empty blocks"
        if size > self.size_bytes - self.held_bytes:
            return _OUT_OF_MEMORY, 0
        block = np.full(size + _ALIGNMENT, 0xFF, np.uint8)
        address = -(-block.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        self._blocks[address] = block
        return 0, address

    def cuMemFree(self, address):
        self._blocks.pop(address)[:] = 0xFF
        return (0,)

    def _copied(self, target: Callable[[], np.ndarray], source: Callable[[], np.ndarray]):
        assert not self.capturing, "copies are no part of a step's graph"
        target()[:] = source()
        return (0,)

    def cuMemcpyHtoDAsync(self, target, source, size, stream):
        return self._copied(lambda: self.array(target, (size,), "u1"), lambda: _host(source, size))

    def cuMemcpyDtoHAsync(self, target, source, size, stream):
        return self._copied(lambda: _host(target, size), lambda: self.array(source, (size,), "u1"))

    def cuMemcpyDtoDAsync(self, target, source, size, stream):
        return self._copied(lambda: self.array(target, (size,), "u1"), lambda: self.array(source, (size,), "u1"))

    def cuStreamSynchronize(self, stream):
        assert not self.capturing, "a captured stream cannot be waited for"
        return (0,)

    def cuStreamBeginCapture(self, stream, mode):
        self._captured = []
        return (0,)

    def cuStreamEndCapture(self, stream):
        captured, self._captured = self._captured, None
        return (_CAPTURE_REFUSED, None) if self.refuse_capture else (0, captured)

    def cuGraphInstantiate(self, graph, flags):
        return 0, tuple(graph)

    def cuGraphDestroy(self, graph):
        return (0,)

    def cuGraphExecDestroy(self, graph):
        return (0,)

    def cuGraphLaunch(self, graph, stream):
        for operation in graph:
            operation()
        return (0,)


def _host(address: int, size: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8)

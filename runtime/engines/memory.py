"""Buffers on a device: caches, and the decoder's weights as engines read them."""

from __future__ import annotations

import math
import weakref
from pathlib import Path

import numpy as np

from vl2.mapped_pages import bounded_file_pages
from vl2.runtime.engines.device import Device
from vl2.safetensors_file import read_header

# TensorRT reads tensors at multiples of it.
_ALIGNMENT = 256
_PIECE_BYTES = 64 << 20
# Mapped pages that may be resident while weights are copied: where CPU and GPU share memory they would stand twice.
_MAPPED_LIMIT_BYTES = 128 << 20


class DeviceArray:
    """Memory of a device, freed with the last reference. shape, dtype, nbytes, address."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: np.dtype | type):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.nbytes = math.prod(shape) * self.dtype.itemsize
        self.address = 0
        if self.nbytes:
            self.address = device.allocate(self.nbytes)
            # at the end of the process the driver may be gone before this
            weakref.finalize(self, device.free, self.address).atexit = False


class DeviceMemory:
    """Caches on a device, as vl2.runtime.backend.CacheMemory."""

    lazy = False

    def __init__(self, device: Device):
        self._device = device

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        """As CacheMemory.allocate. Raises VL2Error where the device has no room."""
        with self._device.lock:
            return DeviceArray(self._device, shape, dtype)

    def copy(self, target: DeviceArray, source: DeviceArray, positions: int) -> None:
        """As CacheMemory.copy."""
        size = positions * math.prod(target.shape[2:]) * target.dtype.itemsize
        with self._device.lock:
            self._device.copy(target.address, source.address, size)
            # the source may be freed right behind
            self._device.synchronize()

    def available_bytes(self) -> float:
        """As CacheMemory.available_bytes."""
        return self._device.free_bytes()


class DeviceWeights:
    """The tensors of a safetensors file on a device. addresses: by name, each a multiple of 256."""

    def __init__(self, device: Device, path: Path):
        entries, offsets, end = read_header(path), {}, 0
        for name, entry in entries.items():
            offsets[name] = end
            end += -(-entry.size_bytes // _ALIGNMENT) * _ALIGNMENT
        self._block = DeviceArray(device, (end,), np.uint8)
        self.addresses = {name: self._block.address + offset for name, offset in offsets.items()}
        with bounded_file_pages(path.parent, _MAPPED_LIMIT_BYTES):
            for name, entry in entries.items():
                if entry.size_bytes:
                    _upload(device, self.addresses[name], np.memmap(path, np.uint8, "r", entry.offset,
                                                                    (entry.size_bytes,)))  # fmt: skip


def _upload(device: Device, address: int, stored: np.ndarray) -> None:
    for start in range(0, len(stored), _PIECE_BYTES):
        device.put(address + start, stored[start:start + _PIECE_BYTES])
    device.synchronize()

"""TensorRT, or TensorRT-RTX, as the runtime uses it: engines with our plugins, and its words where something fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vl2.errors import VL2Error
from vl2.plugins.tensorrt.flavour import logger_of
from vl2.plugins.tensorrt.launcher import launcher_of
from vl2.plugins.tensorrt.plugin import register_plugins
from vl2.runtime.engines.device import Device

_REMEDY = "build the engines again on this machine (`vl2 engine BUNDLE --target NAME --force`); `vl2 doctor` checks it"
# What plugins refuse; TensorRT keeps the creators that were registered first, and with them their list.
_REFUSED: list[VL2Error] = []


class Library:
    """One TensorRT with our plugins on one device. trt: its module."""

    def __init__(self, trt: Any, device: Device):
        self.trt, self.device = trt, device
        device.activate()
        # compiles the kernels once a machine, before anything waits for them
        launcher_of(device.ordinal)
        register_plugins(trt, _REFUSED)
        self._logger = logger_of(trt)
        self._runtime = trt.Runtime(self._logger)

    def engine(self, path: Path) -> Any:
        """The engine in a file. Raises VL2Error where TensorRT does not take it."""
        made = self._runtime.deserialize_cuda_engine(np.memmap(path, np.uint8, "r"))
        self.expect(made is not None, f"loading {path}")
        return made

    def expect(self, holds: bool, what: str) -> None:
        """Raises VL2Error with TensorRT's or a plugin's own words unless a call has gone well."""
        if holds:
            return
        if _REFUSED:
            refused = _REFUSED.pop()
            _REFUSED.clear()
            raise VL2Error(f"{what} failed: {refused.message}", refused.hint)
        said = "; ".join(self._logger.errors[-3:]) or "no reason was given"
        self._logger.errors.clear()
        raise VL2Error(f"{what} failed: {self.trt.__name__} {self.trt.__version__}: {said}", _REMEDY)

"""Which TensorRT is at hand, TensorRT (`tensorrt`) or TensorRT-RTX (`tensorrt_rtx`), and what each needs to start."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from vl2.errors import VL2Error

TENSORRT, RTX = "tensorrt", "tensorrt-rtx"
MODULES = {TENSORRT: "tensorrt", RTX: "tensorrt_rtx"}
_INSTALL = {
    TENSORRT: "on a Jetson it comes with JetPack (`sudo apt install nvidia-jetpack`), elsewhere "
              "`pip install tensorrt` from NVIDIA's index",
    RTX: "pip install '.[engine]' in vl2's folder",
}  # fmt: skip
# TensorRT-RTX 1.7.1's parser opens this name where a graph has plugins; its wheel has the versioned file only, and the
# process would end with "terminate called without an active exception".
_UNVERSIONED = "libtensorrt_rtx.so"


def is_installed(flavour: str) -> bool:
    """Whether its Python package can be found; nothing is loaded."""
    return importlib.util.find_spec(MODULES[flavour]) is not None


def load_tensorrt(flavour: str) -> Any:
    """The module. Raises VL2Error where it is absent or its libraries cannot be loaded."""
    try:
        return importlib.import_module(MODULES[flavour])
    except ImportError as error:
        raise VL2Error(f"{flavour} cannot be imported: {error}", _INSTALL[flavour]) from error


def logger_of(trt: Any) -> Any:
    """A logger that keeps TensorRT's words in `errors` and `warnings` and prints nothing."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors, self.warnings = [], []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)

    return Logger()


def library_environment(flavour: str, folder: Path) -> dict[str, str]:
    """The environment for a process that parses graphs with plugins; `folder` gets the link that the parser opens."""
    environment = dict(os.environ)
    if flavour != RTX:
        return environment
    libraries = importlib.util.find_spec("tensorrt_rtx_libs")
    found = sorted(Path(libraries.submodule_search_locations[0]).glob(f"{_UNVERSIONED}.*")) if libraries else []
    if not found:
        raise VL2Error("tensorrt-rtx is installed without its libraries", _INSTALL[RTX])
    link = folder / _UNVERSIONED
    if not link.exists():
        link.symlink_to(found[0])
    paths = [str(folder), environment.get("LD_LIBRARY_PATH", "")]
    return {**environment, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}

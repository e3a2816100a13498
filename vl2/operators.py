"""The operator library of the `cpu` lowering: where it lies, or why there is none. `plugins/native/` is its source."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vl2.errors import VL2Error

NAME = "libvl2_ops.so"
_FOLDER = Path(__file__).parent
_ABSENT = f"the operator library {NAME} was not built when vl2-edge was installed; " + (
    "install a C++ compiler (such as g++) and then vl2-edge again" if sys.platform == "linux"
    else "it is built on Linux only")


def library_path() -> tuple[Path | None, str | None]:
    """The library for `SessionOptions.register_custom_ops_library` and None, or None and the reason, in one line."""
    path = _FOLDER / NAME
    return (path, None) if path.is_file() else (None, _ABSENT)


def register_operators(options: Any, bundle: Path) -> None:
    """Lets sessions made with these onnxruntime.SessionOptions run graphs of the lowering `cpu`.

    Raises VL2Error where there is no library, or onnxruntime does not take it.
    """
    path, reason = library_path()
    if path is None:
        raise VL2Error(f"{bundle} has the lowering `cpu`, and {reason}",
                       "or export the bundle with --lowering ort (fp16: portable), which needs no library of ours")
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise VL2Error(f"onnxruntime does not load {path}: {error}",
                       "install vl2-edge again, or export the bundle with --lowering ort (fp16: portable)") from error


def instruction_set() -> str | None:
    """What sessions made now will compute with, such as `avx512vnni`; None without a library."""
    import ctypes

    path, _ = library_path()
    if path is None:
        return None
    answer = ctypes.CDLL(str(path)).vl2_isa
    answer.restype = ctypes.c_char_p
    return answer().decode()

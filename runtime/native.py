"""Where the operator library of the `cpu` lowering lies, or why there is none; `plugins/native/` is its source."""

from __future__ import annotations

from pathlib import Path

NAME = "libvl2_ops.so"
_FOLDER = Path(__file__).parent
_ABSENT = (f"the operator library {NAME} was not built when vl2-edge was installed; install a C++ compiler (such as g++) "
           "and then vl2-edge again")


def library_path() -> tuple[Path | None, str | None]:
    """The library for `SessionOptions.register_custom_ops_library` and None, or None and the reason, in one line."""
    path = _FOLDER / NAME
    return (path, None) if path.is_file() else (None, _ABSENT)


def instruction_set() -> str | None:
    """What sessions made now will compute with, such as `avx512vnni`; None without a library."""
    import ctypes

    path, _ = library_path()
    if path is None:
        return None
    answer = ctypes.CDLL(str(path)).vl2_isa
    answer.restype = ctypes.c_char_p
    return answer().decode()

"""Which processor onnxruntime works on here, said in one line that a caller can show."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from vl2.errors import VL2Error

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_SWAP = "pip uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu"


@dataclass(frozen=True)
class Choice:
    """Providers to ask for, in order; `note` says why CUDA is not among them where it was thought of."""

    providers: tuple[str, ...]
    note: str = ""


def choose(device: str, available: list[str], installed: frozenset[str]) -> Choice:
    """Providers for a device of BundleOptions.

    available: as onnxruntime tells; installed: which of its packages are. Raises VL2Error when CUDA is demanded and
    cannot be had.
    """
    if device != "cpu" and CUDA in available:
        return Choice((CUDA, CPU))
    both = {"onnxruntime", "onnxruntime-gpu"} <= installed
    if both:
        reason = "onnxruntime and onnxruntime-gpu are both installed and hide each other"
    elif "onnxruntime-gpu" in installed:
        reason = "this onnxruntime-gpu has no CUDA provider"
    else:
        reason = "onnxruntime-gpu is not installed"
    if device == "cuda":
        raise VL2Error(f"CUDA was asked for, but {reason}", _SWAP)
    return Choice((CPU,), f"not CUDA: {reason}; {_SWAP}" if device == "auto" and both else "")


def installed_packages() -> frozenset[str]:
    """Which packages of onnxruntime are installed; they share one import name and overwrite each other."""
    found = set()
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
    return frozenset(found)

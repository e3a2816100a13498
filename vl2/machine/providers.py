"""onnxruntime: whether each provider that it offers really makes a session and computes, and our own operators load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from vl2.machine.check import FAILED, MISSING, OK, Check
from vl2.machine.gpu import gpu_is_possible
from vl2.machine.interpreter import attempt
from vl2.machine.jetson import is_jetson, wheel_index
from vl2.machine.packages import REMOVE, SWAP
from vl2.machine.probe_models import matmul_model, nbits_model
from vl2.operators import instruction_set, library_path, register_operators
from vl2.runtime.providers import CPU, CUDA, installed_packages

_ERRORS_ONLY = 3
_REINSTALL = "pip install --force-reinstall onnxruntime"
# Others may be offered (Azure, CoreML …); vl2 asks for none of them.
_TENSORRT = ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


def check_onnxruntime() -> Iterator[Check]:
    """The CPU provider, with standard operators and with those of quantized bundles."""
    try:
        import onnxruntime
    except Exception as error:  # a broken installation raises whatever it likes
        yield Check("base", "onnxruntime on the CPU", FAILED, f"{type(error).__name__}: {error}", _REINSTALL, True)
        return
    for name, model, required in (("onnxruntime on the CPU", matmul_model(), True),
                                  ("MatMulNBits on the CPU (int4, int8 bundles)", nbits_model(), False)):
        error = session_error(model, CPU)
        yield Check("base", name, FAILED if error else OK, error or f"onnxruntime {onnxruntime.__version__} computes",
                    _REINSTALL if error else None, required)


def check_gpu_providers() -> Iterator[Check]:
    """Every GPU provider in a process of its own, where a driver that hangs does no harm."""
    import onnxruntime

    offered = onnxruntime.get_available_providers()
    yield _check_cuda(offered)
    for provider in _TENSORRT:
        if provider in offered:
            yield _check_gpu_provider(provider, None)  # this version runs none of them


def check_operators() -> Iterator[Check]:
    """Registers the operator library of the `cpu` lowering with onnxruntime and asks it what it computes with."""
    path, reason = library_path()
    mend = "sudo apt install g++ && pip install --force-reinstall --no-deps .   (in the folder of vl2's sources)"
    if path is None:
        yield Check("base", "operator library (lowering `cpu`)", MISSING, str(reason), mend)
        return
    try:
        import onnxruntime

        register_operators(onnxruntime.SessionOptions(), path)
        detail = f"{path.name} computes with {instruction_set()}"
        yield Check("base", "operator library (lowering `cpu`)", OK, detail)
    except Exception as error:  # VL2Error, or whatever a library that does not load raises
        yield Check("base", "operator library (lowering `cpu`)", FAILED, str(error).splitlines()[0], mend)


def session_error(model: bytes, provider: str) -> str | None:
    """None when the provider computes the probe rightly, else why not in one line."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(model, options, providers=[provider])
        if session.get_providers()[0] != provider:
            return "onnxruntime offers it and then uses the CPU: libraries are missing"
        values = np.arange(32, dtype=np.float32)[None]
        found = session.run(None, {"x": values})[0]
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        return " ".join(str(error).split())[:300]
    right = np.allclose(found, 2 * values.sum(), rtol=1e-3)
    return None if right else f"it computes {found.ravel()[0]}, expected {2 * values.sum()}"


def _check_cuda(offered: list[str]) -> Check:
    mend = SWAP
    if is_jetson():
        mend = f"{REMOVE} && pip install --index-url {wheel_index()} onnxruntime-gpu"
    elif not gpu_is_possible():
        mend = None
    if CUDA in offered:
        return _check_gpu_provider(CUDA, mend)
    wheel = "onnxruntime-gpu" in installed_packages()
    reason = "this onnxruntime-gpu offers no CUDA" if wheel else "onnxruntime-gpu is not installed"
    return Check("GPU", "onnxruntime on CUDA", MISSING, reason, mend)


def _check_gpu_provider(provider: str, mend: str | None) -> Check:
    name = "onnxruntime on CUDA" if provider == CUDA else provider
    code = ("import onnxruntime; getattr(onnxruntime, 'preload_dlls', lambda: None)(); from vl2.machine.probe_models "
            "import matmul_model; from vl2.machine.providers import session_error; "
            f"print(session_error(matmul_model(), {provider!r}) or '')")
    answer, error = attempt(code)
    found = error or answer
    status = OK if not found else FAILED if gpu_is_possible() else MISSING
    return Check("GPU", name, status, found or "makes a session and computes", mend if found else None)

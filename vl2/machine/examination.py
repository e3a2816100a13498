"""All checks of `vl2 doctor`, in the order in which a user meets them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vl2.machine.check import Check, able
from vl2.machine.packages import check_base_packages, check_extras, check_python


def examine(folder: Path) -> Iterator[Check]:
    """Performs every check and yields each when it is done; folder: where bundles are to lie."""
    checks = [*check_python(), *check_base_packages()]
    yield from checks
    if not able(checks):
        return  # what follows needs these packages itself
    from vl2.machine.gpu import check_gpu, check_tensorrt
    from vl2.machine.jetson import check_jetson
    from vl2.machine.providers import check_gpu_providers, check_onnxruntime, check_operators
    from vl2.machine.system import check_system

    yield from check_onnxruntime()
    yield from check_operators()
    yield from check_system(folder)
    yield from check_jetson()
    yield from check_gpu()
    yield from check_gpu_providers()
    yield from check_tensorrt()
    yield from check_extras()

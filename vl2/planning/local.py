"""This machine as a target, measured instead of looked up."""

from __future__ import annotations

import os

from vl2.errors import VL2Error
from vl2.machine.cuda_driver import DriverError, Gpu, find_gpus
from vl2.machine.rates import copy_bandwidth, matrix_rate
from vl2.memory import available_bytes
from vl2.planning.targets import LOCAL, Target
from vl2.runtime.cores import physical_cores

_GIB = 1 << 30
_GPU_USABLE_SHARE = 0.92


def local_target(name: str) -> Target:
    """`local`: CPU and memory of this machine as they are now; `local-gpu`: its first GPU, as the driver describes it.

    Raises VL2Error when there is no GPU.
    """
    return _cpu() if name == LOCAL[0] else _gpu_target(_first_gpu())


def _cpu() -> Target:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share = min(1.0, available_bytes() / total)
    return Target(
        f"this machine, {physical_cores()} cores", "host", round(total / _GIB, 2), round(copy_bandwidth() / 1e9, 1),
        round(share, 3), ("cpu",), "measured now: a copy in memory, a matrix product, what is available",
        cpu_gflops=round(matrix_rate() / 1e9, 1),
    )


def _first_gpu() -> Gpu:
    try:
        found = find_gpus()
    except DriverError as error:
        raise VL2Error(f"this machine has no GPU to plan for: {error}", "`vl2 doctor` says what is missing") from error
    if not found:
        raise VL2Error("the CUDA driver finds no GPU here", "`vl2 doctor` says what is missing")
    return found[0]


def _gpu_target(gpu: Gpu) -> Target:
    return Target(
        gpu.name, "shared" if gpu.integrated else "dedicated", round(gpu.memory_bytes / _GIB, 2),
        round(gpu.bandwidth / 1e9, 1), _GPU_USABLE_SHARE, ("cuda", "engine"), "clocks and widths as the driver says",
        compute_capability=gpu.compute_capability, fp16_tflops=round(gpu.fp16_rate / 1e12, 1),
    )

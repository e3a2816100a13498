"""What memory and cores of this machine do, measured in well under a second each. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vl2.runtime.cores import physical_cores

_COPY_BYTES = 128 << 20
_READ_BYTES = 1 << 30
_MATRIX_SIDE = 1024
_ROUNDS = 3


def copy_bandwidth(threads: int | None = None) -> float:
    """Bytes a second, read and written together, of copying 128 MiB by all physical cores: the best of three rounds.

    A neighbour's load lowers it; reads alone may be up to a third faster.
    """
    threads = threads or physical_cores()
    source = np.ones((threads, _COPY_BYTES // threads), np.uint8)
    target = np.zeros_like(source)
    with ThreadPoolExecutor(threads) as pool:
        return 2 * source.nbytes / _best_seconds(lambda: list(pool.map(np.copyto, target, source)))


def read_bandwidth(threads: int | None = None) -> float:
    """Bytes a second of reading 1 GiB by all physical cores: the best of three rounds."""
    threads = threads or physical_cores()
    source = np.ones((threads, _READ_BYTES // threads // 4), np.float32)
    with ThreadPoolExecutor(threads) as pool:
        return source.nbytes / _best_seconds(lambda: list(pool.map(np.max, source)))


def matrix_rate() -> float:
    """Floating-point operations a second of a float32 matrix product of side 1,024, as NumPy's library does it."""
    matrix = np.random.default_rng(0).random((_MATRIX_SIDE, _MATRIX_SIDE), np.float32)
    result = np.empty_like(matrix)
    return 2 * _MATRIX_SIDE**3 / _best_seconds(lambda: np.matmul(matrix, matrix, out=result))


def _best_seconds(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)

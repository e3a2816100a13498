"""The emulated GPU finds the faults that a GPU would not forgive, and computes as PTX says."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from vl2.errors import VL2Error
from vl2.plugins.cuda.launch import Launch, Plan


@pytest.fixture(scope="module")
def faulty():
    """An emulator of faults.cu."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on this machine: the CUDA kernels cannot be emulated")
    from vl2.plugins.cuda.emulate import Emulator

    return Emulator(sources=(Path(__file__).parent / "faults.cu",))


def run(emulator, kernel: str, threads: int, argument: int, order: int = 0) -> np.ndarray:
    arrays = {"x": np.arange(threads, dtype=np.float32), "y": np.zeros(threads, np.float32)}
    launch = Launch(kernel, (1, 1, 1), (threads, 1, 1), threads * 4, ("x", "y", argument))
    emulator.run(Plan((launch,), {}), arrays, order)
    return arrays["y"]


def test_a_missing_barrier_shows_in_some_order_and_a_present_one_in_none(faulty) -> None:
    want = np.arange(64, dtype=np.float32).reshape(-1, 2)[:, ::-1].ravel()
    for order in range(8):
        assert (run(faulty, "swap_neighbours", 64, 1, order) == want).all()
        assert not (run(faulty, "swap_neighbours", 64, 0, order) == want).all()


def test_a_copy_that_was_not_waited_for_is_not_there(faulty) -> None:
    assert (run(faulty, "copy_later", 32, 1) == np.arange(32)).all()
    assert np.isnan(run(faulty, "copy_later", 32, 0)).all()


@pytest.mark.parametrize("kernel, threads, argument, message", (
    ("half_a_barrier", 64, 40, "__syncthreads that not all threads reach"),
    ("half_a_warp", 32, 16, "not all 32 lanes"),
    ("shift", 32, 1, "access outside a buffer"),
    ("shift", 32, -2000, "access outside a buffer"),
    ("load_wide", 32, 1, "misaligned"),
    ("nothing", 32, 0, "no such kernel"),
))  # fmt: skip
def test_faults_are_named_with_their_kernel(faulty, kernel: str, threads: int, argument: int, message: str) -> None:
    with pytest.raises(VL2Error, match=message):
        run(faulty, kernel, threads, argument)


def test_one_step_of_the_tensor_core_multiplies_matrices(faulty) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in (("a", (16, 16)), ("b", (8, 16)))}
    arrays["d"] = np.full((16, 8), np.nan, np.float32)
    faulty.run(Plan((Launch("one_mma", (1, 1, 1), (32, 1, 1), 0, ("a", "b", "d")),), {}), arrays)
    want = arrays["a"].astype(np.float64) @ arrays["b"].astype(np.float64).T
    assert np.abs(arrays["d"] - want).max() < 1e-5


def test_rounding_to_half_is_numpys_for_all_sizes_of_numbers(faulty) -> None:
    rng = np.random.default_rng(0)
    exact = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    numbers = exact[np.isfinite(exact)].astype(np.float32)
    random = (rng.standard_normal(20000) * np.exp2(rng.integers(-30, 18, 20000))).astype(np.float32)
    middle = (np.sort(numbers)[:-1] + np.diff(np.sort(numbers)) / 2).astype(np.float32)
    x = np.concatenate((numbers, random, middle, np.float32([65520, 65519.996, -65520, np.inf, -np.inf])))
    arrays = {"x": x, "y": np.zeros(len(x), np.float16)}
    faulty.run(Plan((Launch("rounded", (1, 1, 1), (32, 1, 1), 0, ("x", "y", len(x))),), {}), arrays)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    assert (arrays["y"].view(np.uint16) == want.view(np.uint16)).all()

"""The GEMV kernels, emulated, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.plugins.cuda.experts_layer import fitting
from tests.plugins.cuda.weights import half, random_weight, relative_error
from tests.tolerances import CUDA_PRODUCT, CUDA_TENSOR_PRODUCT
from vl2.errors import VL2Error
from vl2.plugins.cuda.linear import LinearProblem, linear_plan
from vl2.plugins.cuda.storage import Storage

STORAGES = [Storage("int4", 32), Storage("int4", 64), Storage("int4", 128), Storage("int4", 0), Storage("int8", 128),
            Storage("int8", 0), Storage("fp16")]  # fmt: skip
# Columns: widths of Tiny, Small, Base (dense ones beyond a tile), nano, and the minis' that are no whole chunk.
COLUMNS = (1280, 896, 2048, 1408, 6848, 10944, 128, 96, 48, 176, 208, 240)


def run(emulator, rng, problem: LinearProblem, order: int = 0) -> float:
    arrays, weight = random_weight(rng, (problem.rows, problem.columns), problem.storage, "weight")
    arrays["x"] = half(rng, (problem.tokens, problem.columns))
    arrays["y"] = np.full((problem.tokens, problem.rows), np.nan, np.float16)
    emulator.run(linear_plan(problem), arrays, order)
    return relative_error(arrays["y"], arrays["x"].astype(np.float64) @ weight.T)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_products_equal_float64_for_every_width_of_the_family(emulator, storage: Storage) -> None:
    rng = np.random.default_rng(1)
    for columns in COLUMNS:
        problem = LinearProblem(int(rng.integers(1, 4)), int(rng.integers(1, 80)), columns, fitting(storage, columns))
        assert run(emulator, rng, problem, int(rng.integers(8))) < CUDA_PRODUCT, problem


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_products_on_tensor_cores_equal_float64(emulator, storage: Storage) -> None:
    rng = np.random.default_rng(3)
    for columns, tokens, rows in ((96, 70, 65), (48, 5, 64), (208, 64, 7), (240, 66, 130), (896, 33, 24)):
        problem = LinearProblem(tokens, rows, columns, fitting(storage, columns))
        assert run(emulator, rng, problem, int(rng.integers(8))) < CUDA_TENSOR_PRODUCT, problem


def test_a_grid_smaller_than_the_matrix_walks_over_all_rows(emulator) -> None:
    rng, problem = np.random.default_rng(2), LinearProblem(1, 40000, 16, Storage("int4", 16))
    assert linear_plan(problem).launches[0].grid[0] * 32 < problem.rows
    assert run(emulator, rng, problem) < CUDA_PRODUCT


def test_an_activation_too_large_for_float16_products_does_not_overflow(emulator) -> None:
    codes, scale = np.full((32, 64), 0xFF, np.uint8), np.full((32, 4), 2.0**-11, np.float16)
    arrays = {"weight": codes, "weight_scale": scale, "x": np.full((1, 128), 60000, np.float16),
              "y": np.zeros((1, 32), np.float16)}  # fmt: skip
    emulator.run(linear_plan(LinearProblem(1, 32, 128, Storage("int4", 32))), arrays)
    assert (arrays["y"] == np.float16(60000 * 7 * 128 / 2048)).all()


def test_storage_that_no_kernel_reads_is_refused() -> None:
    with pytest.raises(VL2Error, match="groups of 48"):
        LinearProblem(1, 8, 96, Storage("int4", 48))
    with pytest.raises(VL2Error, match="int8 rows of 1000"):
        LinearProblem(1, 8, 1000, Storage("int8", 1000))

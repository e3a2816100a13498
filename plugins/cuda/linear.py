"""The launch plan of one product with a weight: y = x Wᵀ."""

from __future__ import annotations

from dataclasses import dataclass

from vl2.plugins.cuda.launch import Launch, Plan, require, tiles
from vl2.plugins.cuda.storage import Storage

THREADS, ROWS, STAGED_COLUMNS = 128, 32, 8192
# Up to so many rows of activations the weight is read once a row; it stays in the second-level cache meanwhile.
GEMV_TOKENS = 4
# About eight blocks a multiprocessor of the largest GPU; more tiles than that are walked over.
_MOST_BLOCKS = 1056


@dataclass(frozen=True)
class LinearProblem:
    """Buffers: x float16 [tokens, columns], weight and weight_scale as `Storage` says, y float16 [tokens, rows]."""

    tokens: int
    rows: int
    columns: int
    storage: Storage

    def __post_init__(self) -> None:
        require(min(self.tokens, self.rows) > 0, f"{self.tokens} tokens and {self.rows} rows", "one of each or more")
        self.storage.shift(self.columns)


def staged_bytes(columns: int) -> int:
    """Shared memory for a row of float32 activations, or for a tile of a longer one."""
    return min(-(-columns // 32) * 32, STAGED_COLUMNS) * 4


def linear_plan(problem: LinearProblem) -> Plan:
    """One launch, no workspace."""
    rows, columns, storage = problem.rows, problem.columns, problem.storage
    arguments = (*storage.names("weight"), "x", "y", rows, columns, storage.shift(columns))
    grid = (min(tiles(rows, ROWS), _MOST_BLOCKS), problem.tokens, 1)
    kernel = f"vl2_linear_{storage.scheme}"
    return Plan((Launch(kernel, grid, (THREADS, 1, 1), staged_bytes(columns), arguments),), {})

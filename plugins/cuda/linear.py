"""The launch plan of one product with a weight: y = x Wᵀ."""

from __future__ import annotations

from dataclasses import dataclass

from vl2.plugins.cuda.launch import Launch, Plan, require, tiles
from vl2.plugins.cuda.storage import Storage

THREADS, ROWS, STAGED_COLUMNS = 128, 32, 8192
TILE, _ACTIVATION_STRIDE = 64, 144
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
    """Shared memory for a row of float32 activations, or for a tile of a longer one, and the gaps between planes."""
    return (min(-(-columns // 32) * 32, STAGED_COLUMNS) + 32) * 4


def linear_plan(problem: LinearProblem) -> Plan:
    """One launch, no workspace."""
    launch = _gemv(problem) if problem.tokens <= GEMV_TOKENS else product_launch(problem, Rows("weight", "x", "y"))
    return Plan((launch,), {})


@dataclass(frozen=True)
class Rows:
    """Which buffers a product on tensor cores reads and writes, and which rows of them.

    Of `experts` stacked matrices, e multiplies the rows offsets[e] … offsets[e + 1] of the order in `source` (None: of
    x itself); row i of the order is written to row target[i], without one to i · stride + offset.
    """

    weight: str
    x: str
    y: str
    experts: int = 1
    source: str | None = None
    target: str | None = None
    offsets: str | None = None
    stride: int = 1
    offset: int = 0


def product_launch(problem: LinearProblem, rows: Rows) -> Launch:
    """y = x Wᵀ for many rows of activations; problem.tokens: rows of the order, of all experts together."""
    storage = problem.storage
    arguments = (*storage.names(rows.weight), rows.x, rows.source, rows.target, rows.offsets, rows.y, problem.tokens,
                 problem.rows, problem.columns, storage.shift(problem.columns), rows.stride, rows.offset)  # fmt: skip
    return Launch(f"vl2_product_{storage.scheme}", product_grid(problem, rows.experts), (THREADS, 1, 1),
                  product_bytes(storage, 1), arguments)  # fmt: skip


def product_grid(problem: LinearProblem, experts: int) -> tuple[int, int, int]:
    """Tiles of weight rows, experts, tiles of tokens: of an expert with twice its share; more are walked over."""
    deep = tiles(problem.tokens, TILE) if experts == 1 else tiles(2 * tiles(problem.tokens, experts), TILE)
    return tiles(problem.rows, TILE), experts, deep


def product_bytes(storage: Storage, streams: int) -> int:
    """Shared memory of the pipeline: activations and packed codes of `streams` matrices, 64 columns a stage."""
    stages = 3 if storage.bits == 4 else 2
    return stages * TILE * (_ACTIVATION_STRIDE + streams * (TILE * storage.bits // 8 + 16))


def _gemv(problem: LinearProblem) -> Launch:
    rows, columns, storage = problem.rows, problem.columns, problem.storage
    arguments = (*storage.names("weight"), "x", "y", rows, columns, storage.shift(columns))
    grid = (min(tiles(rows, ROWS), _MOST_BLOCKS), problem.tokens, 1)
    kernel = f"vl2_linear_{storage.scheme}"
    return Launch(kernel, grid, (THREADS, 1, 1), staged_bytes(columns), arguments)

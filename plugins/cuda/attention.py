"""The launch plan of multi-head attention over caches written in place, and what latent attention shares with it."""

from __future__ import annotations

from dataclasses import dataclass

from vl2.plugins.cuda.launch import Launch, Plan, require, tiles

_THREADS, _ROWS, _KEYS, _LARGEST_HEAD = 128, 16, 16, 256
_PAD, _SCORE_STRIDE = 8, 18
# Shorter splits make more blocks and more to merge; with _ENOUGH_BLOCKS there is nothing to win. Each has scratch for
# all rows, so only as many are made as reach _WANTED_BLOCKS, about four a multiprocessor of the largest GPU.
_SHORTEST_SPLIT, _MOST_SPLITS, _ENOUGH_BLOCKS, _WANTED_BLOCKS = 64, 64, 128, 512
# What a block may have on every GPU from 8.0 on.
_SHARED_LIMIT = 99 << 10


@dataclass(frozen=True)
class Sizes:
    """rows: query rows that share keys; heads: of keys, over all batches; value_size 0 where values lie in the keys."""

    rows: int
    heads: int
    key_size: int
    value_size: int
    result_size: int
    capacity: int

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows a block has: two, where there are so many rows."""
        return 1 if self.rows <= _ROWS else 2

    @property
    def most_splits(self) -> int:
        """Bound of `splits` that no shorter cache exceeds; 1 exactly where there is one split."""
        blocks = tiles(self.rows, _ROWS * self.tiles) * self.heads
        wanted = 1 if blocks >= _ENOUGH_BLOCKS else min(_MOST_SPLITS, _WANTED_BLOCKS // blocks)
        return min(wanted, tiles(self.capacity, _SHORTEST_SPLIT))

    @property
    def chunk(self) -> int:
        """Keys of a split, by the cache's capacity: its length is known on the device only."""
        share = tiles(tiles(self.capacity, self.most_splits), _KEYS) * _KEYS
        return share if self.most_splits == 1 else max(_SHORTEST_SPLIT, share)

    @property
    def splits(self) -> int:
        """Blocks that share a tile of rows."""
        return tiles(self.capacity, self.chunk)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Splits, tiles of rows, heads."""
        return self.splits, tiles(self.rows, _ROWS * self.tiles), self.heads

    @property
    def block(self) -> tuple[int, int, int]:
        """Four warps a tile of rows."""
        return _THREADS * self.tiles, 1, 1

    @property
    def shared_bytes(self) -> int:
        """Queries, two tiles of keys and of values, weights, scores and three numbers a row."""
        rows = _ROWS * self.tiles
        key, value = (tiles(size, 16) * 16 + _PAD if size else 0 for size in (self.key_size, self.value_size))
        halves = (rows + 2 * _KEYS) * key + 2 * _KEYS * value + rows * (_KEYS + _PAD)
        return halves * 2 + (2 * rows * _SCORE_STRIDE + 3 * rows) * 4

    @property
    def workspace(self) -> dict[str, int]:
        """queries, and with splits the partial sums and their marks: for `most_splits`, so that a shorter cache never
        needs more than a longer one."""
        held = {"queries": self.heads * self.rows * self.key_size * 2}
        places = self.heads * self.most_splits * self.rows
        if self.most_splits > 1:
            held |= {"partial": places * self.result_size * 4, "marks": places * 8}
        return held

    def check(self) -> None:
        """Raises VL2Error where a block would not fit into shared memory."""
        need = self.shared_bytes
        require(need <= _SHARED_LIMIT, f"heads of {self.key_size} numbers ({need} bytes a block)", f"{_SHARED_LIMIT}")


def merge_launch(sizes: Sizes, group: int, kv_heads: int, strides: tuple[int, int, int, int]) -> tuple[Launch, ...]:
    """Merges the splits, where there are any. strides of y, in numbers: batch, key head, token, head of the group."""
    if sizes.splits == 1:
        return ()
    arguments = ("partial", "marks", "y", sizes.splits, sizes.rows, sizes.result_size, group, kv_heads, *strides)
    return (Launch("vl2_attention_merge", (sizes.rows, sizes.heads, 1), (_THREADS, 1, 1), 0, arguments),)


def partial_names(sizes: Sizes) -> tuple[str | None, str | None]:
    """The scratch of splits, null pointers without any."""
    return ("partial", "marks") if sizes.splits > 1 else (None, None)


@dataclass(frozen=True)
class AttentionProblem:
    """T new tokens after past_length in caches of `capacity`; the caller sees to it that they fit.

    Buffers: query float16 [B, T, heads · D], key, value [B, T, kv_heads · D], cos, sin float32 [B, T, D], key_cache and
    value_cache float16 [B, C, kv_heads, D] (written), past_length int64, one for all rows; y float16 [B, T, heads · D].
    """

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    capacity: int
    scale: float

    def __post_init__(self) -> None:
        require(self.heads % self.kv_heads == 0, f"{self.heads} heads on {self.kv_heads} key heads", "whole groups")
        fits = self.head_dim % 16 == 0 and self.head_dim <= _LARGEST_HEAD
        require(fits, f"heads of {self.head_dim}", f"a multiple of 16 up to {_LARGEST_HEAD}")
        require(0 < self.tokens <= self.capacity, f"{self.tokens} tokens in a cache of {self.capacity}", "enough room")
        self.sizes.check()

    @property
    def sizes(self) -> Sizes:
        """For the kernel: a group of heads has one key."""
        rows, size = self.tokens * (self.heads // self.kv_heads), self.head_dim
        return Sizes(rows, self.batch * self.kv_heads, size, size, size, self.capacity)


def attention_plan(problem: AttentionProblem) -> Plan:
    """Rotation and cache, attention, and with splits their merge."""
    p, sizes, group = problem, problem.sizes, problem.heads // problem.kv_heads
    size = p.head_dim
    prepare = ("query", "key", "value", "cos", "sin", "past_length", "queries", "key_cache", "value_cache", p.tokens,
               p.heads, p.kv_heads, size, p.capacity)  # fmt: skip
    attend = ("queries", "key_cache", "value_cache", "past_length", "y", *partial_names(sizes), p.tokens, group,
              p.kv_heads, size, p.capacity, sizes.chunk, float(p.scale))  # fmt: skip
    strides = (p.tokens * p.heads * size, group * size, p.heads * size, size)
    launches = (
        Launch("vl2_attention_prepare", (p.tokens, p.batch, 1), (_THREADS, 1, 1), 0, prepare),
        Launch("vl2_attention", sizes.grid, sizes.block, sizes.shared_bytes, attend),
        *merge_launch(sizes, group, p.kv_heads, strides),
    )
    return Plan(launches, sizes.workspace)

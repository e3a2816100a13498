"""The launch plan of absorbed latent attention over the latent cache, for decode and prefill alike."""

from __future__ import annotations

from dataclasses import dataclass

from vl2.plugins.cuda.attention import Sizes, merge_launch, partial_names
from vl2.plugins.cuda.launch import Launch, Plan, require

_THREADS, _LARGEST_RANK = 128, 512


@dataclass(frozen=True)
class LatentProblem:
    """T new tokens after past_length in a cache of `capacity`; the caller sees to it that they fit.

    Buffers, as plugins/latent_attention/op.py but float16: query [B, heads, T, R], query_rope [B, T, heads, E], latent
    [B, T, R], key_rope [B, T, E], cos, sin float32 [B, T, E], cache [B, C, R + E] (written), past_length int64,
    one for all rows; y [B, heads, T, R].
    """

    batch: int
    heads: int
    tokens: int
    rank: int
    rope_dim: int
    capacity: int
    scale: float

    def __post_init__(self) -> None:
        fits = self.rank % 16 == 0 and self.rank <= _LARGEST_RANK and self.rope_dim % 8 == 0
        require(fits, f"latents of {self.rank} + {self.rope_dim}", f"multiples of 16, up to {_LARGEST_RANK}, and of 8")
        require(0 < self.tokens <= self.capacity, f"{self.tokens} tokens in a cache of {self.capacity}", "enough room")
        self.sizes.check()

    @property
    def sizes(self) -> Sizes:
        """For the kernel: all heads share the keys, whose first R numbers are the values."""
        width = self.rank + self.rope_dim
        return Sizes(self.tokens * self.heads, self.batch, width, 0, self.rank, self.capacity)


def latent_plan(problem: LatentProblem) -> Plan:
    """Rotation and cache, attention, and with splits their merge."""
    p, sizes = problem, problem.sizes
    prepare = ("query", "query_rope", "latent", "key_rope", "cos", "sin", "past_length", "queries", "cache", p.tokens,
               p.heads, p.rank, p.rope_dim, p.capacity)  # fmt: skip
    attend = ("queries", "cache", "past_length", "y", *partial_names(sizes), p.tokens, p.heads, p.rank, p.rope_dim,
              p.capacity, sizes.chunk, float(p.scale))  # fmt: skip
    strides = (p.heads * p.tokens * p.rank, 0, p.rank, p.tokens * p.rank)
    launches = (
        Launch("vl2_latent_prepare", (p.tokens, p.batch, 1), (_THREADS, 1, 1), 0, prepare),
        Launch("vl2_latent_attention", sizes.grid, sizes.block, sizes.shared_bytes, attend),
        *merge_launch(sizes, p.heads, 1, strides),
    )
    return Plan(launches, sizes.workspace)

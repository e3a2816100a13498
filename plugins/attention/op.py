"""Multi-head attention as one operator: rotation, the cache written in place, causal softmax (specification 8.1, 8.2).

`attention` is the signature and the reference of the kernels (README.md); `TracedAttention` leaves the node
`vl2::Attention` in a traced graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vl2.model.attention import Attention, Rope
from vl2.model.rope import apply_rope
from vl2.plugins.attention.cache import causal_softmax, read_rows, slots_of, starts_of, write_rows
from vl2.plugins.attention.node import attention_node

OP_TYPE = "Attention"
# The node's inputs in the order of the signature below; those without a tensor are left out.
INPUTS = ("query", "key", "value", "cos", "sin", "key_cache", "value_cache", "past_length", "key_scale", "value_scale",
          "cache_row")


@torch.library.custom_op("vl2::attention", mutates_args=("key_cache", "value_cache", "key_scale", "value_scale"))
def attention(  # noqa: PLR0913  (an operator takes tensors and numbers, not a dataclass)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    past_length: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    cache_row: Tensor | None,
    scale: float,
) -> Tensor:
    """softmax(scale · q · keysᵀ) · values over past and new tokens, causal; writes the new rows into the caches.

    query: float32 [B, T, heads · D]; key, value: [B, T, kv_heads · D]; cos, sin: [B, T, D] as `rope_tables` gives them;
    key_cache, value_cache: float32, float16 or int8 [S, C, kv_heads, D]; past_length: int64, a scalar or [B];
    key_scale, value_scale: float32 [S, C, kv_heads] for int8, else None; cache_row: int64 [B], where each sequence lies
    in the caches, None for 0 … B − 1. Returns [B, T, heads · D].
    Raises VL2Error where the new rows do not fit, and for a cache_row that is not there or given twice.
    """
    size, tokens = key_cache.shape[-1], query.shape[1]
    q = apply_rope(query.unflatten(-1, (-1, size)), cos, sin)
    k = apply_rope(key.unflatten(-1, (-1, size)), cos, sin)
    v = value.unflatten(-1, (-1, size))
    groups = q.shape[2] // k.shape[2]
    y = torch.empty_like(q)
    slots = slots_of(cache_row, len(query), len(key_cache))
    for b, start in enumerate(starts_of(past_length, len(query), tokens, key_cache.shape[1])):
        entries = []
        for cache, scales, rows in ((key_cache, key_scale, k), (value_cache, value_scale, v)):
            held, held_scales = cache[slots[b]], None if scales is None else scales[slots[b]]
            write_rows(held, held_scales, start, rows[b])
            entries.append(read_rows(held, held_scales, start + tokens).repeat_interleave(groups, dim=1))
        weights = causal_softmax(torch.einsum("thd,shd->hts", q[b], entries[0]) * scale)
        y[b] = torch.einsum("hts,shd->thd", weights, entries[1])
    return y.flatten(2)


@attention.register_fake
def _(query, *_others):
    return torch.empty_like(query)


class TracedAttention(nn.Module):
    """Takes the place of `Attention` where a graph with caches written in place is traced; the same parameters."""

    cache_names = Attention.cache_names

    def __init__(self, whole: Attention):
        super().__init__()
        self.head_dim = whole.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = whole.q_proj, whole.k_proj, whole.v_proj, whole.o_proj

    def forward(self, x: Tensor, mask: Tensor | None, rope: Rope, past: tuple[Tensor, ...]) -> tuple[Tensor, tuple]:
        """x: [B, T, H]; mask: unused, rows are causal and have no padding; rope: as in `Attention`.

        past: key_cache, value_cache, past_length and, for INT8, key_scale, value_scale. Returns [B, T, H] and ().
        """
        tensors = (self.q_proj(x), self.k_proj(x), self.v_proj(x), *rope, *past)
        scale = self.head_dim**-0.5
        if torch.compiler.is_exporting():
            y = attention_node(tensors, OP_TYPE, scale)
        else:
            y = attention(*tensors, *[None] * (len(INPUTS) - len(tensors)), scale)
        return self.o_proj(y), ()

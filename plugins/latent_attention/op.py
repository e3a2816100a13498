"""Absorbed latent attention as one operator: rotation, cache written in place, causal softmax (specification 8.3).

`latent_attention` is the signature and the reference of the kernels (README.md); `TracedLatentAttention` leaves the
node `vl2::LatentAttention` in a traced graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vl2.model.attention import LatentAttention, Rope
from vl2.model.rope import apply_rope, deinterleave
from vl2.plugins.attention.cache import causal_softmax, read_rows, slots_of, starts_of, write_rows
from vl2.plugins.attention.node import attention_node

OP_TYPE = "LatentAttention"
# The node's inputs in the order of the signature below; those without a tensor are left out.
INPUTS = ("query", "query_rope", "latent", "key_rope", "cos", "sin", "cache", "past_length", "cache_scale", "cache_row")


@torch.library.custom_op("vl2::latent_attention", mutates_args=("cache", "cache_scale"))
def latent_attention(  # noqa: PLR0913  (an operator takes tensors and numbers, not a dataclass)
    query: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    past_length: Tensor,
    cache_scale: Tensor | None,
    cache_row: Tensor | None,
    scale: float,
) -> Tensor:
    """softmax(scale · (query · latentsᵀ + rotated query_rope · rope keysᵀ)) · latents, causal; writes the new rows.

    query: float32 [B, heads, T, R], q_nope · W_k; query_rope: [B, T, heads, E] and key_rope: [B, T, E], interleaved and
    not rotated; latent: [B, T, R], normalised; cos, sin: [B, T, E]; cache: float32, float16 or int8 [S, C, R + E];
    past_length: int64, a scalar or [B]; cache_scale: float32 [S, C, 2] (latent, rope key) for int8, else None;
    cache_row: int64 [B], where each sequence lies in the cache, None for 0 … B − 1.
    Returns [B, heads, T, R], to be multiplied by W_vᵀ. Raises VL2Error as `vl2::attention` does.
    """
    rank, tokens = latent.shape[-1], latent.shape[1]
    turned = apply_rope(deinterleave(query_rope), cos, sin).transpose(1, 2)
    key = apply_rope(deinterleave(key_rope)[:, :, None], cos, sin)[:, :, 0]
    y = torch.empty_like(query)
    slots = slots_of(cache_row, len(query), len(cache))
    for b, start in enumerate(starts_of(past_length, len(query), tokens, cache.shape[1])):
        parts = []
        for index, (part, rows) in enumerate(((slice(rank), latent), (slice(rank, None), key))):
            row = slots[b]
            held, scales = cache[row, :, part], None if cache_scale is None else cache_scale[row, :, index]
            write_rows(held, scales, start, rows[b])
            parts.append(read_rows(held, scales, start + tokens))
        weights = causal_softmax((query[b] @ parts[0].T + turned[b] @ parts[1].T) * scale)
        y[b] = weights @ parts[0]
    return y


@latent_attention.register_fake
def _(query, *_others):
    return torch.empty_like(query)


class TracedLatentAttention(nn.Module):
    """Takes the place of `LatentAttention` where a graph with a cache written in place is traced; same parameters."""

    cache_names = LatentAttention.cache_names

    def __init__(self, whole: LatentAttention):
        super().__init__()
        self.scale = whole.scale
        self.sizes = (whole.heads, whole.rank, whole.nope, whole.rope_dim, whole.v_dim)
        for name, child in whole.named_children():
            setattr(self, name, child)

    def forward(self, x: Tensor, mask: Tensor | None, rope: Rope, past: tuple[Tensor, ...]) -> tuple[Tensor, tuple]:
        """x: [B, T, H]; mask: unused, rows are causal and have no padding; rope: as in `LatentAttention`.

        past: cache, past_length and, for INT8, cache_scale. Returns [B, T, H] and ().
        """
        heads, rank, nope, rope_dim, v_dim = self.sizes
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if hasattr(self, "q_a_proj") else self.q_proj(x)
        q_nope, q_rope = q.unflatten(-1, (heads, -1)).split((nope, rope_dim), dim=-1)
        latent, key_rope = self.kv_a_proj_with_mqa(x).split((rank, rope_dim), dim=-1)
        w_k, w_v = self.kv_b_proj.weight.unflatten(0, (heads, -1)).split((nope, v_dim), dim=1)
        query = q_nope.transpose(1, 2) @ w_k
        tensors = (query, q_rope, self.kv_a_layernorm(latent), key_rope, *rope, *past)
        if torch.compiler.is_exporting():
            y = attention_node(tensors, OP_TYPE, self.scale)
        else:
            y = latent_attention(*tensors, *[None] * (len(INPUTS) - len(tensors)), self.scale)
        return self.o_proj((y @ w_v.transpose(1, 2)).transpose(1, 2).flatten(2)), ()

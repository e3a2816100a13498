"""The decoder's two attentions. Both return only the cache entries of the new tokens; the caller appends them.

Sequence-major caches: plain key (after rotation) and value [B, P, kv_heads, head_dim]; latent [B, P, R + dr], the
normalised latent first, the rotated rope key after it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vl2.config import LanguageConfig
from vl2.model.norm import RMSNorm
from vl2.model.rope import apply_rope, deinterleave, latent_softmax_scale

_INNER_EPS = 1e-6  # the inner norms ignore rms_norm_eps (specification 8)

Rope = tuple[Tensor, Tensor]
Cache = tuple[Tensor, ...]


class Attention(nn.Module):
    """Plain multi-head attention, with grouped keys and values where kv_heads < heads (specification 8.2)."""

    cache_names = ("key", "value")

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.kv_heads, config.head_dim
        size, kv_size, bias = config.hidden_size, config.kv_heads * config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(size, kv_size, bias=bias)
        self.v_proj = nn.Linear(size, kv_size, bias=bias)
        self.o_proj = nn.Linear(size, size, bias=bias)

    def forward(self, x: Tensor, mask: Tensor, rope: Rope, past: Cache) -> tuple[Tensor, Cache]:
        """x: [B, T, H]; mask: additive [B, 1, T, P + T]; rope: cos, sin [B, T, d]; past: () or (key, value).

        Returns the output [B, T, H] and the new (key, value), each [B, T, kv_heads, head_dim].
        """
        q = apply_rope(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)), *rope)
        k = apply_rope(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)), *rope)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        keys, values = (torch.cat((old, new), dim=1) for old, new in zip(past, (k, v), strict=True)) if past else (k, v)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), self._per_head(keys), self._per_head(values), mask.to(q.dtype), scale=self.head_dim**-0.5
        )
        return self.o_proj(y.transpose(1, 2).flatten(2)), (k, v)

    def _per_head(self, x: Tensor) -> Tensor:
        """[B, S, kv_heads, d] to [B, heads, S, d]: each kv head serves heads / kv_heads neighbouring query heads."""
        groups = self.heads // self.kv_heads
        return (x if groups == 1 else x.repeat_interleave(groups, dim=2)).transpose(1, 2)


class LatentAttention(nn.Module):
    """Multi-head latent attention (specification 8.3).

    `absorbed` (the default) attends in the latent space; naive forms every head's keys and values. They are equal but
    for rounding: naive is the truth of the tests and the cheaper form for training.
    """

    cache_names = ("latent",)

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.absorbed = True
        self.heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope_dim, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.scale = latent_softmax_scale(config)
        size, bias = config.hidden_size, config.attention_bias
        query_size = self.heads * config.head_dim
        self.has_query_rank = config.q_lora_rank is not None
        if self.has_query_rank:
            self.q_a_proj = nn.Linear(size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _INNER_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_size, bias=False)
        else:
            self.q_proj = nn.Linear(size, query_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(size, self.rank + self.rope_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank, _INNER_EPS)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.v_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v_dim, size, bias=bias)

    def forward(self, x: Tensor, mask: Tensor, rope: Rope, past: Cache) -> tuple[Tensor, Cache]:
        """x: [B, T, H]; mask: additive [B, 1, T, P + T]; rope: cos, sin [B, T, dr]; past: () or (latent,).

        Returns the output [B, T, H] and the new (latent,) [B, T, R + dr].
        """
        q_nope, q_rope = self._queries(x, rope)
        new = self._latent(x, rope)
        latent = torch.cat((past[0], new), dim=1) if past else new
        attend = self._absorbed if self.absorbed else self._naive
        return self.o_proj(attend(q_nope, q_rope, latent, mask).flatten(2)), (new,)

    def _queries(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.has_query_rank else self.q_proj(x)
        nope, rotary = q.unflatten(-1, (self.heads, -1)).split((self.nope, self.rope_dim), dim=-1)
        return nope, apply_rope(deinterleave(rotary), *rope)

    def _latent(self, x: Tensor, rope: Rope) -> Tensor:
        latent, key = self.kv_a_proj_with_mqa(x).split((self.rank, self.rope_dim), dim=-1)
        key = apply_rope(deinterleave(key)[:, :, None], *rope)[:, :, 0]
        return torch.cat((self.kv_a_layernorm(latent), key), dim=-1)

    def _up_projections(self) -> tuple[Tensor, Tensor]:
        """kv_b_proj as W_k [heads, dn, R] and W_v [heads, dv, R]: within each head first nope, then v rows."""
        return self.kv_b_proj.weight.unflatten(0, (self.heads, -1)).split((self.nope, self.v_dim), dim=1)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        w_k, w_v = self._up_projections()
        tokens = q_nope.shape[1]
        # heads are folded into the query axis: one key serves them all, so it is never repeated
        q = torch.cat((q_nope.transpose(1, 2) @ w_k, q_rope.transpose(1, 2)), dim=-1).flatten(1, 2)
        scores = (q @ latent.transpose(1, 2)).unflatten(1, (self.heads, tokens)) * self.scale + mask.to(q.dtype)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        y = (weights.flatten(1, 2) @ latent[..., : self.rank]).unflatten(1, (self.heads, tokens))
        return (y @ w_v.transpose(1, 2)).transpose(1, 2)

    def _naive(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        latent, key = latent.split((self.rank, self.rope_dim), dim=-1)
        k_nope, v = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).split((self.nope, self.v_dim), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, key[:, :, None].expand(-1, -1, self.heads, -1)), dim=-1)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask.to(q.dtype), scale=self.scale
        )
        return y.transpose(1, 2)

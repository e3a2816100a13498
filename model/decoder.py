"""The language decoder: one code path for prefill and decode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vl2.config import LanguageConfig
from vl2.model.attention import Attention, Cache, LatentAttention, Rope
from vl2.model.moe import FeedForward, MoE
from vl2.model.norm import RMSNorm
from vl2.model.rope import rope_tables


class DecoderLayer(nn.Module):
    """x ← x + attention(norm(x)); x ← x + FFN(norm(x))."""

    def __init__(self, config: LanguageConfig, l: int):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = LatentAttention(config) if config.use_mla else Attention(config)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = MoE(config) if config.is_moe(l) else FeedForward(size, config.intermediate_size)

    def forward(self, x: Tensor, mask: Tensor, rope: Rope, past: Cache) -> tuple[Tensor, Cache]:
        """Shapes as in `Attention.forward`."""
        y, new = self.self_attn(self.input_layernorm(x), mask, rope, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), new


class Decoder(nn.Module):
    """embed_tokens, layers, norm and lm_head of the checkpoint's `language.model` and `language.lm_head`."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=config.initializer_range)
        self.layers = nn.ModuleList(DecoderLayer(config, l) for l in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, attention_mask: Tensor, past: Cache = ()
    ) -> tuple[Tensor, Cache]:
        """The hidden states after the final norm [B, T, H] and the new cache entries, in the order of `cache_names`.

        inputs_embeds: [B, T, H]; position_ids: [B, T] int64; attention_mask: [B, P + T] bool, false at left padding;
        past: () for none, or per layer (key, value) of `Attention` or (latent,) of `LatentAttention`, each [B, P, …].
        Outputs at padded positions are finite and mean nothing.
        """
        total = attention_mask.shape[1]
        mask = additive_mask(attention_mask, inputs_embeds.shape[1], inputs_embeds.dtype)
        rope = rope_tables(self.config, position_ids, total)
        width = len(self.layers[0].self_attn.cache_names)
        assert len(past) in (0, width * len(self.layers)), f"{len(past)} cache tensors for {len(self.layers)} layers"
        x, new = inputs_embeds, []
        for l, layer in enumerate(self.layers):
            x, entries = layer(x, mask, rope, past[l * width : (l + 1) * width])
            new.extend(entries)
        return self.norm(x), tuple(new)

    def logits(self, hidden: Tensor) -> Tensor:
        """lm_head as float32: [..., H] to [..., V]."""
        return self.lm_head(hidden).float()

    def cache_names(self) -> tuple[str, ...]:
        """The order of `past` and of the new entries: key.0, value.0, key.1, … or latent.0, latent.1, …"""
        return tuple(f"{name}.{l}" for l, layer in enumerate(self.layers) for name in layer.self_attn.cache_names)

    def empty_cache(self, batch: int, dtype: torch.dtype = torch.float32) -> Cache:
        """A past of no tokens (P = 0), on the model's device."""
        c = self.config
        shape = (batch, 0, c.kv_lora_rank + c.qk_rope_head_dim) if c.use_mla else (batch, 0, c.kv_heads, c.head_dim)
        device = self.norm.weight.device
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in self.cache_names())

    def use_absorbed(self, absorbed: bool) -> None:
        """Chooses the form of every latent attention: absorbed (the default) or naive. No effect on plain attention."""
        for layer in self.layers:
            if isinstance(layer.self_attn, LatentAttention):
                layer.self_attn.absorbed = absorbed


def append_cache(past: Cache, new: Cache) -> Cache:
    """`past` grown by the entries that `Decoder.forward` returned."""
    return tuple(torch.cat(pair, dim=1) for pair in zip(past, new, strict=True)) if past else new


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Positions in generation, [B, S] bool to int64: real tokens count from 0, padding gets 1 (specification 10)."""
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(~attention_mask, 1)


def additive_mask(attention_mask: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """0 where query i may see key j, else the lowest finite number: [B, 1, T, P + T].

    attention_mask: [B, P + T] bool. Key j is visible to query i iff j ≤ P + i and attention_mask[j]; a query also sees
    itself, so that a padding row has something to attend to and stays finite.
    """
    total = attention_mask.shape[1]
    key = torch.arange(total, device=attention_mask.device)
    query = torch.arange(tokens, device=attention_mask.device)[:, None] + (total - tokens)
    visible = ((key < query) & attention_mask[:, None, :]) | (key == query)
    return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]

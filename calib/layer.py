"""A decoder layer in parts that fit in little memory: attention one sequence at a time, dense feed-forward by rows.

Modules name their parameters as `DecoderLayer` does, so that a part is filled by the same names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vl2.calib.statistics import ROWS_AT_ONCE, SiteSum, StatisticsOptions, record_inputs
from vl2.calib.weights import Weights, load_part
from vl2.config import LanguageConfig
from vl2.model.attention import Attention, LatentAttention
from vl2.model.decoder import additive_mask
from vl2.model.moe import FeedForward, Router
from vl2.model.norm import RMSNorm
from vl2.model.rope import rope_tables

Replaced = Mapping[str, Tensor]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a calibration set. spans: rows of each sequence; modality: uint8 [tokens]; weight: a_t, float32
    [tokens]."""

    spans: tuple[tuple[int, int], ...]
    modality: Tensor
    weight: Tensor
    options: StatisticsOptions

    def __len__(self) -> int:
        return len(self.modality)

    def record(self, total: SiteSum, rows: slice | Tensor, x: Tensor) -> None:
        """Adds what entered a Linear, [..., K], at these rows of the set."""
        total.add(x.flatten(0, -2), self.modality[rows], self.weight[rows])

    def chunks(self) -> Iterator[slice]:
        return (slice(start, start + ROWS_AT_ONCE) for start in range(0, len(self), ROWS_AT_ONCE))


class AttentionPart(nn.Module):
    """x + attention(norm(x)) of whole sequences without a past."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config) if config.use_mla else Attention(config)
        # naive: kv_b_proj is applied as the Linear whose input is to be seen, and a prefill costs less memory
        self.self_attn.absorbed = False

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, H], one sequence, or [B, T, H], versions of it; same shape out."""
        tokens, batch = x.shape[-2], x if x.dim() == 3 else x[None]
        mask = additive_mask(torch.ones(1, tokens, dtype=torch.bool), tokens, x.dtype)
        rope = rope_tables(self.config, torch.arange(tokens)[None], tokens)
        return x + self.self_attn(self.input_layernorm(batch), mask, rope, ())[0].view_as(x)


class DensePart(nn.Module):
    """x + FFN(norm(x)) of a dense layer."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, H]; same shape out."""
        return x + self.mlp(self.post_attention_layernorm(x))


class RoutedPart(nn.Module):
    """Norm, router and shared experts of a layer with routed experts, which are read one by one instead."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = nn.Module()
        self.mlp.gate = Router(config)
        inner = (config.n_shared_experts or 0) * config.moe_intermediate_size
        self.mlp.shared_experts = FeedForward(config.hidden_size, inner) if inner else None


def attention_sites(config: LanguageConfig) -> dict[str, str]:
    """Site → the Linear of the attention whose input it is; others that share the input are not named."""
    query = "q_a_proj" if config.use_mla and config.q_lora_rank is not None else "q_proj"
    sites = {"attention.input": query, "attention.output": "o_proj"}
    if config.use_mla:
        sites["attention.latent"] = "kv_b_proj"
    if query == "q_a_proj":
        sites["attention.q_latent"] = "q_b_proj"
    return sites


def load_attention(weights: Weights, l: int, replaced: Replaced | None = None) -> AttentionPart:
    config = weights.config.language_config
    return load_part(weights, lambda: AttentionPart(config), f"language.layers.{l}.", replaced)


def load_dense(weights: Weights, l: int, replaced: Replaced | None = None) -> DensePart:
    config = weights.config.language_config
    return load_part(weights, lambda: DensePart(config), f"language.layers.{l}.", replaced)


def load_routed(weights: Weights, l: int, replaced: Replaced | None = None) -> RoutedPart:
    config = weights.config.language_config
    return load_part(weights, lambda: RoutedPart(config), f"language.layers.{l}.", replaced)


def observe(part: nn.Module, linears: Mapping[str, nn.Linear], tokens: Tokens) -> Observed:
    """`part` with a sum for the input of each Linear, by site."""
    sums = {site: SiteSum.empty(linear.in_features) for site, linear in linears.items()}
    return Observed(part, linears, tokens, sums)


@dataclass(frozen=True)
class Observed:
    """A module whose Linears' inputs are summed up as it runs."""

    part: nn.Module
    linears: Mapping[str, nn.Linear]
    tokens: Tokens
    sums: Mapping[str, SiteSum]

    def __call__(self, x: Tensor, rows: slice) -> Tensor:
        """x: [n, H], the inputs of these rows of the set."""
        recorders = {site: (linear, partial(self.tokens.record, self.sums[site], rows))
                     for site, linear in self.linears.items()}
        with record_inputs(recorders):
            return self.part(x)

    def tensors(self) -> dict[str, Tensor]:
        """The statistics of all sites, as `SiteSum.tensors`."""
        return {name: tensor for site, total in self.sums.items() for name, tensor in total.tensors(site).items()}

"""Where calibration measures, which Linears read there, and what can take the inverse of a scale (AWQ's folds).

| site             | consumers                                        | producer that is divided            |
|------------------|--------------------------------------------------|-------------------------------------|
| attention.input  | q, k, v; or q or q_a, and kv_a                   | input_layernorm                     |
| attention.q_latent, attention.latent | q_b; kv_b                    | q_a_layernorm; kv_a_layernorm       |
| attention.output | o                                                | rows of v, or the v rows of kv_b    |
| mlp.input        | gate, up (experts', shared, dense), the router   | post_attention_layernorm            |
| expert.{e}.input | this expert's gate and up                        | the layer's: see mlp.input          |
| mlp.down, shared.down, expert.{e}.down | down                       | rows of up: silu(g) · u is linear in u |

Folds are exact in real arithmetic: 2306.00978, section 3.2, for the norms; the rest by the same argument.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vl2.config import LanguageConfig


@dataclass(frozen=True)
class Site:
    """One statistics site and the modules that read it. `kind` chooses how its Hessian is regularised (`blend`).

    norm: the norm whose weight the site's scale divides; row_source: the module whose rows it divides instead, in the
    order of the site's channels (all of them, or `rows`).
    """

    name: str
    consumers: tuple[str, ...]
    kind: str = "layer"
    norm: str | None = None
    row_source: str | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Unit:
    """Sites whose weights are in memory together, producers before consumers."""

    sites: tuple[Site, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(module for site in self.sites for module in site.consumers)


def layer_units(config: LanguageConfig, layer: int, stage: str) -> list[Unit]:
    """The units of a decoder layer's stage, "attention" or "mlp"."""
    prefix = f"language.model.layers.{layer}"
    if stage == "attention":
        return [_latent(config, prefix) if config.use_mla else _plain(config, prefix)]
    if not config.is_moe(layer):
        return [_feed_forward(prefix, f"{prefix}.mlp", "mlp.input", "mlp.down")]
    units = []
    if config.n_shared_experts:
        units.append(_feed_forward(prefix, f"{prefix}.mlp.shared_experts", "mlp.input", "shared.down"))
    for e in range(config.n_routed_experts):
        units.append(_feed_forward(prefix, f"{prefix}.mlp.experts.{e}", f"expert.{e}.input", f"expert.{e}.down"))
    return units


def router_of(config: LanguageConfig, layer: int, stage: str) -> str | None:
    """The router that reads `mlp.input` beside the quantized Linears and takes its scale too."""
    return f"language.model.layers.{layer}.mlp.gate" if stage == "mlp" and config.is_moe(layer) else None


def _plain(config: LanguageConfig, prefix: str) -> Unit:
    attention = f"{prefix}.self_attn"
    # a value row that serves several query heads would need one scale for all of them
    source = f"{attention}.v_proj" if config.kv_heads == config.num_attention_heads else None
    return Unit((
        Site("attention.input", tuple(f"{attention}.{m}_proj" for m in "qkv"), norm=f"{prefix}.input_layernorm"),
        Site("attention.output", (f"{attention}.o_proj",), row_source=source),
    ))  # fmt: skip


def _latent(config: LanguageConfig, prefix: str) -> Unit:
    attention = f"{prefix}.self_attn"
    has_rank = config.q_lora_rank is not None
    query = f"{attention}.q_a_proj" if has_rank else f"{attention}.q_proj"
    norm = f"{prefix}.input_layernorm"
    sites = [Site("attention.input", (query, f"{attention}.kv_a_proj_with_mqa"), norm=norm)]
    if has_rank:
        sites.append(Site("attention.q_latent", (f"{attention}.q_b_proj",), norm=f"{attention}.q_a_layernorm"))
    sites.append(Site("attention.latent", (f"{attention}.kv_b_proj",), norm=f"{attention}.kv_a_layernorm"))
    nope, v_dim = config.qk_nope_head_dim, config.v_head_dim
    heads = torch.arange(config.num_attention_heads)[:, None] * (nope + v_dim)
    rows = (heads + nope + torch.arange(v_dim)).flatten()
    output = Site("attention.output", (f"{attention}.o_proj",), row_source=f"{attention}.kv_b_proj", rows=rows)
    return Unit((*sites, output))


def _feed_forward(prefix: str, block: str, site_in: str, site_down: str) -> Unit:
    kind = "expert" if site_in.startswith("expert.") else "layer"
    return Unit((
        Site(site_in, (f"{block}.gate_proj", f"{block}.up_proj"), kind, norm=f"{prefix}.post_attention_layernorm"),
        Site(site_down, (f"{block}.down_proj",), "down", row_source=f"{block}.up_proj"),
    ))  # fmt: skip

"""Feed-forward parts of the decoder: the gated FFN, the router, the routed experts (specification 9)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vl2.config import LanguageConfig


class FeedForward(nn.Module):
    """down(silu(gate(x)) ⊙ up(x)), no biases."""

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., H]; same shape out."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Routing(NamedTuple):
    """What the router decided for N tokens: idx int64 [N, k], weights float32 [N, k], logits float32 [N, E]."""

    idx: Tensor
    weights: Tensor
    logits: Tensor


class Router(nn.Module):
    """Chooses num_experts_per_tok experts a token; always in float32. The order of the chosen means nothing."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = nn.Parameter(torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> Routing:
        """x: [N, H]."""
        bias = self.e_score_correction_bias if self.config.topk_method == "noaux_tc" else None
        return choose_experts(self.logits(x), bias, self.config)

    def logits(self, x: Tensor) -> Tensor:
        """float32 [N, E] for x [N, H]."""
        with _without_autocast(x.device.type):
            return F.linear(x.float(), self.weight.float())


class RoutingRule(Protocol):
    """The fields of a language configuration that say how experts are chosen."""

    topk_method: str
    scoring_func: str
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


def choose_experts(logits: Tensor, correction_bias: Tensor | None, rule: RoutingRule) -> Routing:
    """From router logits float32 [N, E] to experts and weights (specification 9)."""
    scores = logits.softmax(dim=-1) if rule.scoring_func == "softmax" else logits.sigmoid()
    selection = _selection(scores, correction_bias, rule)
    values, idx = selection.topk(rule.num_experts_per_tok, dim=-1, sorted=False)
    # the correction bias chooses but does not weight
    weights = scores.gather(-1, idx) if rule.topk_method == "noaux_tc" else values
    if rule.num_experts_per_tok > 1 and rule.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return Routing(idx, weights * rule.routed_scaling_factor, logits)


def _selection(scores: Tensor, correction_bias: Tensor | None, rule: RoutingRule) -> Tensor:
    """The values the top-k is taken of [N, E]; experts of dropped groups get 0, not −∞, as in the original."""
    if rule.topk_method == "greedy":
        return scores
    noaux = rule.topk_method == "noaux_tc"
    choice = scores + correction_bias.float() if noaux else scores
    if rule.n_group == rule.topk_group:
        return choice
    grouped = choice.unflatten(-1, (rule.n_group, -1))
    value = grouped.topk(2, dim=-1).values.sum(dim=-1) if noaux else grouped.amax(dim=-1)
    kept = value.topk(rule.topk_group, dim=-1, sorted=False).indices
    mask = torch.zeros_like(value).scatter(-1, kept, 1.0) > 0
    return torch.where(mask[..., None], grouped, 0.0).flatten(-2)


def _without_autocast(device_type: str):
    """A tracer sees no autocast region where none is active."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


class Experts(nn.Module):
    """All routed experts of a layer, stacked: gate_proj, up_proj [E, I, H] and down_proj [E, H, I]."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        experts, size, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, size))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, size))
        self.down_proj = nn.Parameter(torch.empty(experts, size, inner))
        for parameter in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, x: Tensor, idx: Tensor, weights: Tensor) -> Tensor:
        """Σ weight · FFN_e(x) over the chosen experts; each expert computes only the tokens routed to it.

        x: [N, H]; idx: [N, k] int64; weights: [N, k] float32. Returns [N, H] in x's dtype: expert outputs in the
        activation dtype, weighted and summed in float32.
        """
        experts, chosen = self.gate_proj.shape[0], idx.shape[1]
        order = idx.flatten().argsort(stable=True)
        token = order // chosen
        counts = idx.flatten().bincount(minlength=experts).tolist()
        # unbind, not indexing: its backward stacks the experts' gradients once
        matrices = (w.unbind() for w in (self.gate_proj, self.up_proj, self.down_proj))
        parts = zip(x[token].split(counts), *matrices, strict=True)
        outputs = [F.linear(F.silu(F.linear(p, gate)) * F.linear(p, up), down) for p, gate, up, down in parts if len(p)]
        weighted = torch.cat(outputs).float() * weights.flatten()[order][:, None]
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add(0, token, weighted).to(x.dtype)


class MoE(nn.Module):
    """Router, routed experts and, where configured, one fused FFN of shared experts added with weight 1."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts
        self.shared_experts = FeedForward(config.hidden_size, shared * config.moe_intermediate_size) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, H]; same shape out."""
        flat = x.flatten(0, 1)
        routing = self.gate(flat)
        y = self.experts(flat, routing.idx, routing.weights).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)

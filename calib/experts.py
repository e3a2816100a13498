"""Routed experts, one in memory at a time: their statistics, and the layer's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vl2.calib.layer import Replaced, RoutedPart, Tokens
from vl2.calib.statistics import ROWS_AT_ONCE, SiteSum
from vl2.calib.tensor_file import Shapes
from vl2.calib.weights import Weights
from vl2.config import LanguageConfig

Advance = Callable[[], None]


class Expert(NamedTuple):
    """gate, up: float32 [I, H]; down: float32 [H, I]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def inner(self, x: Tensor) -> Tensor:
        """What enters `down`: [n, H] to [n, I]."""
        return F.silu(F.linear(x, self.gate)) * F.linear(x, self.up)


def load_expert(weights: Weights, l: int, e: int, replaced: Replaced | None = None) -> Expert:
    """The matrices of expert e of layer l; `replaced` stands for the file's, by the file's names."""
    names = [weights.sources[f"language.layers.{l}.mlp.experts.{matrix}_proj"][e] for matrix in Expert._fields]
    return Expert(*(replaced[name].float() if replaced and name in replaced else weights.read(name) for name in names))


@dataclass(frozen=True)
class Routes:
    """Where N tokens go. idx: int64 [N, k]; weights: float32 [N, k]; scores: router probabilities, float32 [N, E]."""

    idx: Tensor
    weights: Tensor
    scores: Tensor

    def of(self, e: int) -> tuple[Tensor, Tensor]:
        """Rows of the tokens that go to expert e, ascending, and their routing weights."""
        rows, slots = (self.idx == e).nonzero(as_tuple=True)
        return rows, self.weights[rows, slots]

    def counts(self, modality: Tensor) -> Tensor:
        """Tokens by expert and modality: int64 [E, 2]."""
        experts = self.scores.shape[1]
        keys = self.idx * 2 + modality.long()[:, None]
        return torch.bincount(keys.flatten(), minlength=2 * experts).view(experts, 2)


def route(part: RoutedPart, hidden: Tensor, config: LanguageConfig) -> Routes:
    """hidden: [N, H] before the norm."""
    parts = []
    for rows in hidden.split(ROWS_AT_ONCE):
        routing = part.mlp.gate(part.post_attention_layernorm(rows))
        softmax = config.scoring_func == "softmax"
        scores = routing.logits.softmax(dim=-1) if softmax else routing.logits.sigmoid()
        parts.append((routing.idx, routing.weights, scores))
    return Routes(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Extra:
    """Tokens that an expert did not get but came nearest to: their rows, and p / p̄ as weights (guide, section 1.8)."""

    rows: Tensor
    weights: Tensor


def extra_tokens(routes: Routes, e: int, wanted: int) -> Extra:
    """The not routed tokens with the highest router probability for e, so many that it has `wanted` with its own.

    p̄ is the mean probability of its own tokens; of the extra ones where it has none.
    """
    own, _ = routes.of(e)
    scores = routes.scores[:, e].clone()
    scores[own] = -1
    count = max(0, min(wanted, len(scores)) - len(own))
    top, rows = scores.topk(count)
    mean = routes.scores[own, e].mean() if len(own) else top.mean()
    order = rows.argsort()
    return Extra(rows[order], (top / mean.clamp_min(torch.finfo(torch.float32).tiny))[order])


def expert_shapes(routes: Routes, config: LanguageConfig) -> Shapes:
    """Names, dtypes and shapes of what `expert_statistics` gives."""
    size, inner = config.hidden_size, config.moe_intermediate_size
    shapes = {}
    for e in range(config.n_routed_experts):
        shapes |= SiteSum.shapes(f"expert.{e}.input", size) | SiteSum.shapes(f"expert.{e}.down", inner)
        if len(extra_tokens(routes, e, inner).rows):
            site = f"expert.{e}.down.extra"
            shapes |= SiteSum.shapes(site, inner) | {f"{site}.weight": (torch.float32, (1,))}
    return shapes


@dataclass(frozen=True)
class ExpertInputs:
    """hidden: [N, H] at the layer's second norm, before it; norm of `part`; where the tokens go."""

    hidden: Tensor
    part: RoutedPart
    routes: Routes
    tokens: Tokens


def expert_statistics(weights: Weights, l: int, inputs: ExpertInputs, advance: Advance) -> Iterator[tuple[str, Tensor]]:
    """The statistics of every expert's `input` and `down`, expert by expert.

    Where an expert has fewer tokens than `down` has inputs, `down.extra` tells of the nearest others, apart, with
    `weight` = Σ p / p̄: how many tokens of its own they stand for.
    """
    config = weights.config.language_config
    for e in range(config.n_routed_experts):
        expert, (own, routed) = load_expert(weights, l, e), inputs.routes.of(e)
        a = inputs.tokens.weight[own]
        if inputs.tokens.options.token_weight == "router":
            a = a * routed.square()
        entering, leaving = SiteSum.empty(config.hidden_size), SiteSum.empty(config.moe_intermediate_size)
        _sum_rows(expert, inputs, (own, a), (entering, leaving))
        yield from entering.tensors(f"expert.{e}.input").items()
        yield from leaving.tensors(f"expert.{e}.down").items()
        extra = extra_tokens(inputs.routes, e, config.moe_intermediate_size)
        if len(extra.rows):
            total = SiteSum.empty(config.moe_intermediate_size)
            _sum_rows(expert, inputs, (extra.rows, extra.weights * inputs.tokens.weight[extra.rows]), (None, total))
            yield from total.tensors(f"expert.{e}.down.extra").items()
            yield f"expert.{e}.down.extra.weight", extra.weights.sum().view(1)
        advance()


def _sum_rows(
    expert: Expert, inputs: ExpertInputs, chosen: tuple[Tensor, Tensor], sums: tuple[SiteSum | None, SiteSum]
) -> None:
    for rows, a in zip(*(part.split(ROWS_AT_ONCE) for part in chosen), strict=True):
        x = inputs.part.post_attention_layernorm(inputs.hidden[rows])
        modality = inputs.tokens.modality[rows]
        if sums[0] is not None:
            sums[0].add(x, modality, a)
        sums[1].add(expert.inner(x), modality, a)


def add_routed_output(weights: Weights, l: int, inputs: ExpertInputs, replaced: Replaced, advance: Advance) -> None:
    """Adds the routed and the shared experts' outputs to `inputs.hidden`, in place.

    In the reference's order: experts are summed in float32 from the first to the last, then the shared ones.
    """
    hidden, part = inputs.hidden, inputs.part
    output = torch.zeros_like(hidden)
    for e in range(weights.config.language_config.n_routed_experts):
        expert, (rows, routed) = load_expert(weights, l, e, replaced), inputs.routes.of(e)
        for chunk, weight in zip(rows.split(ROWS_AT_ONCE), routed.split(ROWS_AT_ONCE), strict=True):
            x = part.post_attention_layernorm(hidden[chunk])
            output.index_add_(0, chunk, F.linear(expert.inner(x), expert.down) * weight[:, None])
        advance()
    for rows in inputs.tokens.chunks():
        if part.mlp.shared_experts is not None:
            output[rows] += part.mlp.shared_experts(part.post_attention_layernorm(hidden[rows]))
        hidden[rows] += output[rows]

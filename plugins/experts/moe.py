"""Routing and routed and shared experts as one operator, for targets whose kernel chooses the experts itself.

`moe` is the signature and the reference; `vl2::Experts` of the operator library (`plugins/native`) is compared with it.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vl2.model.moe import MoE, choose_experts
from vl2.plugins.experts.op import experts

OP_TYPE = "MoE"
# The node's inputs in order, with their types; absent ones are left out by name.
INPUTS = {
    "x": "float", "logits": "float", "gate_proj": "float", "up_proj": "float", "down_proj": "float",
    "correction_bias": "float", "shared_gate_proj": "float", "shared_up_proj": "float", "shared_down_proj": "float",
}  # fmt: skip
OPTIONAL = tuple(INPUTS)[5:]
# The node's attributes with their types; each is a field of the language configuration.
RULE = {
    "num_experts_per_tok": int, "n_group": int, "topk_group": int, "norm_topk_prob": bool, "topk_method": str,
    "scoring_func": str, "routed_scaling_factor": float,
}  # fmt: skip


@torch.library.custom_op("vl2::moe", mutates_args=())
def moe(  # noqa: PLR0913  (an operator takes tensors and numbers, not a dataclass)
    x: Tensor,
    logits: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    correction_bias: Tensor | None,
    shared_gate_proj: Tensor | None,
    shared_up_proj: Tensor | None,
    shared_down_proj: Tensor | None,
    num_experts_per_tok: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    topk_method: str,
    scoring_func: str,
    routed_scaling_factor: float,
) -> Tensor:
    """Σ over the chosen experts of weight · FFN_e(x), plus the FFN of the shared ones (specification 9).

    x: [N, H]; logits: float32 [N, E]; gate_proj, up_proj: [E, I, H]; down_proj: [E, H, I]; correction_bias: [E] or
    None; shared_gate_proj, shared_up_proj: [S, H] and shared_down_proj: [H, S], or None. Returns [N, H].
    """
    numbers = (num_experts_per_tok, n_group, topk_group, norm_topk_prob, topk_method, scoring_func)
    rule = SimpleNamespace(**dict(zip(RULE, (*numbers, routed_scaling_factor), strict=True)))
    routing = choose_experts(logits, correction_bias, rule)
    y = experts(x, routing.idx, routing.weights, gate_proj, up_proj, down_proj)
    if shared_gate_proj is None:
        return y
    hidden = F.silu(F.linear(x, shared_gate_proj)) * F.linear(x, shared_up_proj)
    return y + F.linear(hidden, shared_down_proj)


@moe.register_fake
def _(x, *_others):
    return torch.empty_like(x)


class TracedMoE(nn.Module):
    """Takes the place of `MoE` while a model is traced; the same parameters under the same names."""

    def __init__(self, whole: MoE):
        super().__init__()
        self.gate, self.experts, self.shared_experts = whole.gate, whole.experts, whole.shared_experts

    def forward(self, x: Tensor) -> Tensor:
        """As `MoE.forward`."""
        flat, rule, shared = x.flatten(0, 1), self.gate.config, self.shared_experts
        stacked = (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj)
        bias = self.gate.e_score_correction_bias if rule.topk_method == "noaux_tc" else None
        layers = (None,) * 3 if shared is None else (shared.gate_proj, shared.up_proj, shared.down_proj)
        weights = [None if layer is None else layer.weight for layer in layers]
        # greedy knows no groups, and a configuration may leave them out
        unread = {"n_group": 1, "topk_group": 1} if rule.topk_method == "greedy" else {}
        fields = [kind(unread.get(name, getattr(rule, name))) for name, kind in RULE.items()]
        return moe(flat, self.gate.logits(flat), *stacked, bias, *weights, *fields).view_as(x)

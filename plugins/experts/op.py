"""The routed experts as one operator: the tracer sees one node, each lowering decides how it computes.

`experts` is the signature and the reference; other forms (`vl2.model.moe.Experts`, ONNX lowerings, kernels) are
compared with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vl2.model.moe import Experts

# The node that tracing leaves in the ONNX graph: inputs in the order of the signature below, with their types.
OP_TYPE = "Experts"
INPUTS = {
    "x": "float",
    "idx": "int64",
    "weights": "float",
    "gate_proj": "float",
    "up_proj": "float",
    "down_proj": "float",
}


@torch.library.custom_op("vl2::experts", mutates_args=())
def experts(  # noqa: PLR0913  (an operator takes tensors, not a dataclass)
    x: Tensor, idx: Tensor, weights: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """y[n] = Σ_j weights[n, j] · down_e(silu(gate_e(x[n])) ⊙ up_e(x[n])) with e = idx[n, j] (specification 9).

    x: [N, H]; idx: [N, k] int64, no expert twice in a row; weights: [N, k] float32; gate_proj, up_proj: [E, I, H];
    down_proj: [E, H, I]. Returns [N, H] in x's dtype; expert outputs are weighted and summed in float32.
    """
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in range(gate_proj.shape[0]):
        token, choice = torch.nonzero(idx == e, as_tuple=True)
        hidden = F.silu(F.linear(x[token], gate_proj[e])) * F.linear(x[token], up_proj[e])
        y.index_add_(0, token, F.linear(hidden, down_proj[e]).float() * weights[token, choice, None])
    return y.to(x.dtype)


@experts.register_fake
def _(x, idx, weights, gate_proj, up_proj, down_proj):  # noqa: PLR0913
    return torch.empty_like(x)


class TracedExperts(nn.Module):
    """Takes the place of `Experts` while a model is traced; the same parameters under the same names."""

    def __init__(self, stacked: Experts):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = stacked.gate_proj, stacked.up_proj, stacked.down_proj

    def forward(self, x: Tensor, idx: Tensor, weights: Tensor) -> Tensor:
        """As `experts`."""
        return experts(x, idx, weights, self.gate_proj, self.up_proj, self.down_proj)

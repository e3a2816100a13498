"""Attention of the vision tower as one operator: every token sees all of its tile (specification 5).

`vision_attention` is the signature and the reference of the kernels (README.md); `TracedVisionAttention` leaves the
node `vl2::VisionAttention` in a traced graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vl2.model.vision import VisionAttention

OP_TYPE = "VisionAttention"


@torch.library.custom_op("vl2::vision_attention", mutates_args=())
def vision_attention(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """softmax(scale · q · kᵀ) · v of each head and tile, softmax in float32.

    qkv: float32 [N, T, 3 · heads · D], rows laid out [3, heads, D]. Returns [N, T, heads · D].
    """
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) * scale).softmax(dim=-1, dtype=torch.float32)
    return (weights @ v).transpose(1, 2).flatten(2)


@vision_attention.register_fake
def _(qkv, heads, scale):
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


class TracedVisionAttention(nn.Module):
    """Takes the place of `VisionAttention` where a graph with this operator is traced; the same parameters."""

    def __init__(self, whole: VisionAttention):
        super().__init__()
        self.heads, self.scale = whole.heads, (whole.proj.in_features // whole.heads) ** -0.5
        self.qkv, self.proj = whole.qkv, whole.proj

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, tokens, width]; same shape out."""
        return self.proj(vision_attention(self.qkv(x), self.heads, self.scale))

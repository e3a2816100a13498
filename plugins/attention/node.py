"""The node that an attention over caches written in place leaves in a traced graph.

The tracer wraps an operator that is known to write its inputs into one that ONNX cannot express, so this one does not
say so. It is for tracing only; `vl2::attention` and `vl2::latent_attention` compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define("vl2::attention_node", "(Tensor[] inputs, str op_type, float scale) -> Tensor")


@torch.library.register_fake("vl2::attention_node")
def _(inputs, op_type, scale):
    return torch.empty_like(inputs[0])


def attention_node(inputs: tuple[Tensor, ...], op_type: str, scale: float) -> Tensor:
    """The output of `vl2::op_type`, of the shape of its first input."""
    return torch.ops.vl2.attention_node(list(inputs), op_type, scale)

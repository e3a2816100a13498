"""The `cpu` lowering: matrices and experts as nodes of the operator library in `plugins/`, all else standard."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vl2.export.assemble import TracedGraph
from vl2.export.lowering.nodes import Scope
from vl2.export.lowering.portable import apply_lowerings, drop_unread
from vl2.export.storing import NATIVE, Storing
from vl2.export.trace import DOMAIN
from vl2.export.weights import Weight
from vl2.manifest import CACHE_ROW
from vl2.plugins.attention import op as attention_op
from vl2.plugins.experts import moe
from vl2.plugins.latent_attention import op as latent_attention_op
from vl2.plugins.native.layout import Layout

# Inputs of the nodes that write caches, in their order.
ATTENTIONS = {op.OP_TYPE: op.INPUTS for op in (attention_op, latent_attention_op)}
# Attributes of vl2::Experts that the traced node has under the names of the configuration.
EXPERTS_RENAMED = {"num_experts_per_tok": "top_k"}


def lower(traced: TracedGraph, storing: Storing) -> TracedGraph:
    """Replaces every node of our domain, in place; the library's nodes read weights as `storing` says they lie."""
    graph, weights = traced.model.graph, dict(traced.weights)
    read = _Reader(storing, weights)
    lowerings = {"Linear": LinearLowering(read), "MoE": ExpertsLowering(read)}
    apply_lowerings(graph, lowerings)
    drop_unread(graph, weights)
    _add_slots(graph)
    return TracedGraph(traced.model, weights)


@dataclass(frozen=True)
class _Reader:
    """What the library's nodes say of the weights they read."""

    storing: Storing
    weights: dict[str, Weight]

    def is_native(self, weight: ir.Value) -> bool:
        """Whether the library reads it."""
        return self.storing.use_of(self.weights[weight.name].parameter) == NATIVE

    def layout(self, weight: ir.Value) -> Layout:
        """Of one matrix."""
        return self.storing.parts_of(self.weights[weight.name].parameter)[0].layout


def _add_slots(graph: ir.Graph) -> None:
    """The ports of `vl2.export.graphs.with_slots`, in place: lengths and rows of the caches by sequence."""
    lengths = next((value for value in graph.inputs if value.name == "past_length"), None)
    if lengths is None:
        return
    lengths.shape = ir.Shape(["batch"])
    rows = ir.Value(name=CACHE_ROW, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch"]))
    graph.inputs.insert(graph.inputs.index(lengths) + 1, rows)
    for node in graph:
        names = ATTENTIONS.get(node.op_type) if node.domain == DOMAIN else None
        if names is None:
            continue
        for value, name in zip(node.inputs, names, strict=False):
            if value is not None and name.endswith(("cache", "_scale")):
                value.shape = ir.Shape(["slots", *value.shape[1:]])
        node.resize_inputs(len(names))
        node.replace_input_with(names.index(CACHE_ROW), rows)


class LinearLowering:
    """`vl2::Linear` with the attributes of its weight's layout; the router, whose matrix stays float32, row by row."""

    def __init__(self, read: _Reader) -> None:
        self._read = read

    def __call__(self, scope: Scope, node: ir.Node) -> ir.Value:
        """The value that replaces the node's output; new nodes are added to `scope`."""
        weight = node.inputs[1]
        if not self._read.is_native(weight):
            return _row_by_row(scope, node)
        layout = self._read.layout(weight)
        sizes, mode = {"N": layout.rows, "K": layout.columns}, self._read.storing.mode
        return scope.op("Linear", node.inputs, domain=node.domain, mode=mode, **sizes, **_form("", layout))


def _row_by_row(scope: Scope, node: ir.Node) -> ir.Value:
    """W · x of each row by itself: one product of all rows would give a row other bits with other rows beside it."""
    x, weight, bias = (*node.inputs, None)[:3]
    assert bias is None and len(x.shape) == 2, f"{node.name} is not a router's product"
    last = scope.constant(np.array([-1], np.int64))
    columns = scope.op("MatMul", [weight, scope.op("Unsqueeze", [x, last])])
    return scope.op("Squeeze", [columns, last])


class ExpertsLowering:
    """`vl2::Experts`: routing, routed and shared experts."""

    def __init__(self, read: _Reader) -> None:
        self._read = read

    def __call__(self, scope: Scope, node: ir.Node) -> ir.Value:
        """The value that replaces the node's output; new nodes are added to `scope`."""
        given = dict(zip(moe.INPUTS, (*node.inputs, *[None] * len(moe.INPUTS)), strict=False))
        gate, down, shared = given["gate_proj"], given["down_proj"], given["shared_gate_proj"]
        inputs = [given["x"], given["logits"], gate, down, given["correction_bias"]]
        experts, inner, hidden = gate.shape
        attributes = {"hidden_size": hidden, "inner_size": inner, "experts": experts,
                      "mode": self._read.storing.mode}  # fmt: skip
        attributes |= {EXPERTS_RENAMED.get(name, name): _value(node.attributes[name]) for name in moe.RULE}
        attributes |= _form("", self._read.layout(gate)) | _form("down_", self._read.layout(down))
        if shared is not None:
            shared_down = given["shared_down_proj"]
            inputs += [shared, shared_down]
            attributes["shared_size"] = shared.shape[0]
            attributes |= _form("shared_", self._read.layout(shared))
            attributes |= _form("shared_down_", self._read.layout(shared_down))
        while inputs[-1] is None:
            inputs.pop()
        return scope.op("Experts", inputs, domain=node.domain, **attributes)


def _form(prefix: str, layout: Layout) -> dict[str, str | int]:
    return {f"{prefix}scheme": layout.scheme, f"{prefix}group_size": layout.group_size,
            f"{prefix}scale_dtype": layout.scale_dtype}  # fmt: skip


def _value(attribute: ir.Attr) -> int | float | str:
    return attribute.value

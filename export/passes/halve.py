"""Turns a float32 graph into one of float16 where it counts: strongly typed, so that nothing is chosen by a builder.

Matrix products run in float16, but for those with a matrix stored as float32 (the router); what only moves numbers
keeps their type; all else (norms, sums of the residual stream, rotary tables) stays float32. Casts stand at the
borders, once a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_MOVING = frozenset({"Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Concat", "Flatten", "Gather",
                     "Pad", "Identity", "Expand"})  # fmt: skip
_INTEGERS = frozenset({"Shape", "Size"})
_PRODUCTS = frozenset({"MatMul", "Gemm"})


@dataclass(frozen=True)
class Precision:
    """Operators by how they are computed.

    half: in float16; following: in float16 where all their inputs that are not constant are, of sums those with a
    bias only; untouched: of an operator in `half`, the positions that are left as they are.
    """

    half: frozenset[str]
    following: frozenset[str] = frozenset()
    untouched: Mapping[str, frozenset[int]] = field(default_factory=dict)


def halve(graph: ir.Graph, precision: Precision) -> None:
    """Casts in place. Graph inputs, outputs and initializers keep their types."""
    casts = _Casts(graph)
    for node in list(graph):
        if node.op_type == "CastLike":
            node = _plain_cast(node)
        wanted = _wanted(node, precision)
        untouched = precision.untouched.get(node.op_type, frozenset())
        for index, value in enumerate(node.inputs):
            floats = value is not None and wanted is not None and value.dtype in (FLOAT, HALF)
            if floats and value.dtype != wanted and index not in untouched:
                node.replace_input_with(index, casts.cast(value, wanted, node))
        _type_outputs(node, wanted)
    for index, value in enumerate(graph.outputs):
        if value.dtype == HALF and index == 0:
            graph.outputs[index] = casts.output(value)


class _Casts:
    """The casts made so far, by value."""

    def __init__(self, graph: ir.Graph):
        self._graph, self._made = graph, {}

    def cast(self, value: ir.Value, to: ir.DataType, before: ir.Node) -> ir.Value:
        """The value as the other type; made before its first reader."""
        if value not in self._made:
            made = ir.Value(name=f"{value.name}.{to.name.lower()}", type=ir.TensorType(to), shape=value.shape)
            node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", to)], outputs=[made], name=made.name)
            self._graph.insert_before(before, node)
            self._made[value] = made
        return self._made[value]

    def output(self, value: ir.Value) -> ir.Value:
        """A graph output in float32 under the value's name."""
        made = ir.Value(name=value.name, type=ir.TensorType(FLOAT), shape=value.shape)
        value.name = f"{value.name}.half"
        self._graph.append(ir.Node("", "Cast", [value], [ir.AttrInt64("to", FLOAT)], outputs=[made], name=made.name))
        return made


def _plain_cast(node: ir.Node) -> ir.Node:
    """TensorRT's parsers differ in CastLike; the type is known here."""
    node.op_type, to = "Cast", node.inputs[1].dtype
    node.resize_inputs(1)
    node.attributes["to"] = ir.AttrInt64("to", to)
    return node


def _wanted(node: ir.Node, precision: Precision) -> ir.DataType | None:
    """The float type that a node computes in; None for one that takes what comes."""
    if node.op_type in _INTEGERS or node.op_type in ("Cast", "Constant"):
        return None
    if node.op_type in precision.half:
        return FLOAT if node.op_type in _PRODUCTS and _reads_wide_matrix(node) else HALF
    follows = node.op_type in precision.following and (node.op_type != "Add" or _adds_bias(node))
    if node.op_type in _MOVING or follows:
        moving = [value for value in node.inputs if value is not None and value.dtype in (FLOAT, HALF)]
        varying = [value for value in moving if not _is_constant(value)] or moving
        return HALF if varying and all(value.dtype == HALF for value in varying) else FLOAT
    return FLOAT


def _reads_wide_matrix(node: ir.Node) -> bool:
    return any(value.is_initializer() and value.dtype == FLOAT and len(value.shape) > 1 for value in node.inputs)


def _adds_bias(node: ir.Node) -> bool:
    """Other sums make the residual stream, whose rounding would grow from layer to layer."""
    return any(_is_constant(value) and value.shape is not None and len(value.shape) == 1 for value in node.inputs)


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is None:
        return value.is_initializer()
    return producer.op_type == "Constant" or producer.op_type == "Cast" and _is_constant(producer.inputs[0])


def _type_outputs(node: ir.Node, wanted: ir.DataType | None) -> None:
    """The tracer left some types out, and the float ones may have changed."""
    for value in node.outputs:
        dtype = _output_type(node, wanted, value)
        if dtype is not None:
            value.type = ir.TensorType(dtype)


def _output_type(node: ir.Node, wanted: ir.DataType | None, value: ir.Value) -> ir.DataType | None:
    if node.op_type in _INTEGERS:
        return ir.DataType.INT64
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type == "Constant":
        tensor = ir.convenience.get_const_tensor(value)
        return None if tensor is None else tensor.dtype
    # codes come first; the result has the type of the scales
    first = node.inputs[1 if node.op_type == "DequantizeLinear" else 0].dtype
    return wanted if first in (FLOAT, HALF) else value.dtype or first

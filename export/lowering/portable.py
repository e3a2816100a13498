"""The `portable` lowering: standard ONNX operators only. Every faster lowering is compared with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
from onnx_ir import convenience

from vl2.export.assemble import TracedGraph
from vl2.export.lowering.experts import ExpertsLowering
from vl2.export.lowering.linear import LinearLowering
from vl2.export.lowering.nodes import Scope
from vl2.export.trace import DOMAIN
from vl2.export.weights import Weight

# Takes the scope for new nodes and the node of our domain; returns the value that replaces its output.
Lowering = Callable[[Scope, ir.Node], ir.Value]


def lower(traced: TracedGraph) -> TracedGraph:
    """Replaces every node of our domain, in place; stacked experts and the vocabulary become several weights."""
    weights = dict(traced.weights)
    apply_lowerings(traced.model.graph, standard_lowerings(traced.model.graph, weights))
    drop_unread(traced.model.graph, weights)
    traced.model.opset_imports.pop(DOMAIN, None)
    return TracedGraph(traced.model, weights)


def standard_lowerings(graph: ir.Graph, weights: dict[str, Weight]) -> dict[str, Lowering]:
    """By operator; parts of divided weights are added to `weights`."""

    def divide(whole: ir.Value, parts: list[Weight]) -> list[ir.Value]:
        if f"{whole.name}.0" in weights:  # read by two nodes
            return [graph.initializers[f"{whole.name}.{number}"] for number in range(len(parts))]
        values = [_part(whole, number, part) for number, part in enumerate(parts)]
        for value, part in zip(values, parts, strict=True):
            graph.initializers.add(value)
            weights[value.name] = part
        return values

    def split_experts(stacked: ir.Value) -> list[ir.Value]:
        weight = weights[stacked.name]
        return divide(stacked, [weight.of_expert(e) for e in range(weight.shape[0])])

    def split_rows(matrix: ir.Value, rows: int) -> list[ir.Value]:
        return divide(matrix, weights[matrix.name].row_blocks(rows))

    return {"Linear": LinearLowering(split_rows), "Experts": ExpertsLowering(split_experts)}


def apply_lowerings(graph: ir.Graph, lowerings: Mapping[str, Lowering]) -> None:
    """Replaces the nodes of our domain that have a lowering."""
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type in lowerings:
            scope = Scope(f"{node.outputs[0].name}.")
            _replace(graph, node, lowerings[node.op_type](scope, node), scope.nodes)


def drop_unread(graph: ir.Graph, weights: dict[str, Weight]) -> None:
    """Removes initializers that no node reads any more."""
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
        weights.pop(name, None)


def _part(whole: ir.Value, number: int, part: Weight) -> ir.Value:
    return ir.Value(
        name=f"{whole.name}.{number}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(part.shape)
    )


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value, nodes: list[ir.Node]) -> None:
    old = node.outputs[0]
    convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [value])

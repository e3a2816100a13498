"""The `portable` lowering: standard ONNX operators only. Every faster lowering is compared with it."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import convenience

from vl2.export.assemble import TracedGraph
from vl2.export.lowering.experts import ExpertsLowering
from vl2.export.lowering.linear import LinearLowering
from vl2.export.lowering.nodes import Scope
from vl2.export.trace import DOMAIN
from vl2.export.weights import Weight


def lower(traced: TracedGraph) -> TracedGraph:
    """Replaces every node of our domain, in place; stacked experts become one weight an expert."""
    graph, weights = traced.model.graph, dict(traced.weights)

    def split(stacked: ir.Value) -> list[ir.Value]:
        rows = _expert_values(stacked, weights.pop(stacked.name))
        for value, weight in rows:
            graph.initializers.add(value)
            weights[value.name] = weight
        return [value for value, _ in rows]

    lowerings = {"Linear": LinearLowering(), "Experts": ExpertsLowering(split)}
    for node in list(graph):
        if node.domain == DOMAIN:
            scope = Scope(f"{node.outputs[0].name}.")
            _replace(graph, node, lowerings[node.op_type](scope, node), scope.nodes)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    traced.model.opset_imports.pop(DOMAIN, None)
    return TracedGraph(traced.model, weights)


def _expert_values(stacked: ir.Value, weight: Weight) -> list[tuple[ir.Value, Weight]]:
    kind, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(weight.shape[1:])
    names = [f"{stacked.name}.{e}" for e in range(weight.shape[0])]
    return [(ir.Value(name=name, type=kind, shape=shape), weight.of_expert(e)) for e, name in enumerate(names)]


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value, nodes: list[ir.Node]) -> None:
    old = node.outputs[0]
    convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [value])

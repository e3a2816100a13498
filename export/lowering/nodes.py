"""Building ONNX nodes in the order in which they are computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


class Scope:
    """Nodes of one (sub)graph under construction; names begin with `prefix`, which no other scope may have."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes) -> ir.Value:
        """Adds a node with one output, which is returned; attributes as in `op_multi`."""
        return self._add(domain, op_type, inputs, 1, attributes)[0]

    def op_multi(self, op_type: str, inputs: Sequence[ir.Value | None], outputs: int, **attributes) -> list[ir.Value]:
        """Adds a standard node with several outputs; graphs, numbers, texts and tensors as attributes."""
        return self._add("", op_type, inputs, outputs, attributes)

    def _add(self, domain: str, op_type: str, inputs: Sequence, outputs: int, attributes: dict) -> list[ir.Value]:
        name = f"{self.prefix}{op_type}_{len(self.nodes)}"
        values = [ir.Value(name=name if outputs == 1 else f"{name}.{i}") for i in range(outputs)]
        attrs = [_attribute(key, value) for key, value in attributes.items()]
        self.nodes.append(ir.Node(domain, op_type, inputs, attrs, outputs=values, name=name))
        return values

    def constant(self, array: np.ndarray) -> ir.Value:
        """A small constant."""
        return self.op("Constant", [], value=ir.tensor(array))

    def graph(self, outputs: Sequence[ir.Value], name: str) -> ir.Graph:
        """The nodes as the body of a control-flow node; it takes its inputs from the graphs around it."""
        return ir.Graph([], outputs, nodes=self.nodes, name=name)


def _attribute(key: str, value) -> ir.Attr:
    if isinstance(value, ir.Graph):
        return ir.AttrGraph(key, value)
    if isinstance(value, ir.TensorProtocol):
        return ir.AttrTensor(key, value)
    if isinstance(value, str):
        return ir.AttrString(key, value)
    if isinstance(value, float):
        return ir.AttrFloat32(key, value)
    return ir.AttrInt64(key, value)

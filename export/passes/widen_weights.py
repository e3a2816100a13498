"""A Cast to float32 at each use of a narrow weight, such that it runs then and not before.

A Cast of an initializer waits for nothing: onnxruntime runs all of them first, or folds them at the start, and holds
every weight in float32. Here the Cast reads `Reshape(weight, 0 · Shape(x))`, where x is what the weight meets. Zeros
keep the weight's own sides, so nothing is copied, but only a run that has come to x can go on.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class Widening:
    """Inserts the Casts; what depends on x only is shared by the weights that meet the same x."""

    def __init__(self) -> None:
        self._zeros: dict[tuple[ir.Value, int], ir.Value] = {}

    def widen(self, weight: ir.Value) -> None:
        """Lets every reader of the initializer `weight` read its float32 copy instead."""
        for use in list(weight.uses()):
            met = use.node.inputs[0]
            assert use.idx == 1 and met is not None, f"{use.node.name} does not take {weight.name} second"
            kept = self.behind(met, weight, len(weight.shape), f"{use.node.name}.kept")
            wide = make_node("Cast", [kept.outputs[0]], f"{use.node.name}.wide", to=ir.DataType.FLOAT)
            wide.outputs[0].type, wide.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), weight.shape
            use.node.graph.insert_before(use.node, [kept, wide])
            use.node.replace_input_with(1, wide.outputs[0])

    def behind(self, met: ir.Value, weight: ir.Value, rank: int, name: str) -> ir.Node:
        """A node that gives `weight` (its first `rank` sides, the others being 1) only once `met` is there.

        The node is not inserted; it must stand before the reader of `met`.
        """
        return make_node("Reshape", [weight, self._zero_sides(met, rank)], name)

    def _zero_sides(self, x: ir.Value, rank: int) -> ir.Value:
        """0 · the first `rank` sides of x, of which the first is dynamic everywhere."""
        if (x, rank) not in self._zeros:
            sides = make_node("Shape", [x], f"{x.name}.sides{rank}", start=0, end=rank)
            zero = make_node("Constant", [], f"{x.name}.zero{rank}", value=ir.tensor(np.array(0, np.int64)))
            product = make_node("Mul", [sides.outputs[0], zero.outputs[0]], f"{x.name}.zeros{rank}")
            _insert_behind(x, [sides, zero, product])
            self._zeros[x, rank] = product.outputs[0]
        return self._zeros[x, rank]


def _insert_behind(x: ir.Value, nodes: list[ir.Node]) -> None:
    producer = x.producer()
    if producer is None:
        x.graph.insert_before(x.graph[0], nodes)
    else:
        producer.graph.insert_after(producer, nodes)


def make_node(op_type: str, inputs: list[ir.Value | None], name: str, domain: str = "", **attributes) -> ir.Node:
    """A node with one output of the same name; attributes are whole numbers or tensors."""
    attrs = [
        ir.AttrTensor(key, value) if isinstance(value, ir.TensorProtocol) else ir.AttrInt64(key, value)
        for key, value in attributes.items()
    ]
    return ir.Node(domain, op_type, inputs, attrs, outputs=[ir.Value(name=name)], name=name)

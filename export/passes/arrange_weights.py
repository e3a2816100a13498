"""Moves rearrangements of weights from the graph to the writing of the file.

Latent attention reads kv_b_proj as per-head W_k and W_v: reshaped, split and transposed. Left in the graph this would
be copied in every step, or kept twice in memory by a session that folds constants.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from vl2.export.weights import LayoutStep, Weight


def arrange_weights(model: ir.Model, weights: dict[str, Weight]) -> None:
    """Turns Reshape, Split and Transpose of weights into new weights, in place in both."""
    graph = model.graph
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if source is None or source.name not in weights or node.op_type not in _STEPS:
            continue
        results = _STEPS[node.op_type](node, weights[source.name].shape)
        for output, (step, shape) in zip(node.outputs, results, strict=True):
            value = _initializer(graph, weights, weights[source.name].then(step, shape))
            output.replace_all_uses_with(value)
        graph.remove(node, safe=True)
    for name in [name for name in weights if not graph.initializers[name].uses()]:
        del weights[name], graph.initializers[name]


def _initializer(graph: ir.Graph, weights: dict[str, Weight], weight: Weight) -> ir.Value:
    steps = "".join(f":{step}({','.join(map(str, arguments))})" for step, arguments in weight.layout)
    value = ir.Value(
        name=weight.parameter + steps, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(weight.shape)
    )
    weights[value.name] = weight
    graph.initializers.add(value)
    return value


Result = tuple[LayoutStep, tuple[int, ...]]


def _reshape(node: ir.Node, shape: tuple[int, ...]) -> list[Result]:
    target = _constant(node.inputs[1])
    known = math.prod(side for side in target if side > 0)
    # no target here has a 0; -1 stands for what is left
    sides = tuple(math.prod(shape) // known if side == -1 else side for side in target)
    assert math.prod(sides) == math.prod(shape), f"{node.name} reshapes {shape} to {target}"
    return [(("reshape", sides), sides)]


def _split(node: ir.Node, shape: tuple[int, ...]) -> list[Result]:
    axis = node.attributes["axis"].as_int() % len(shape)
    lengths = _constant(node.inputs[1])
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    parts = zip(starts, lengths, strict=True)
    return [
        (("narrow", (axis, start, length)), (*shape[:axis], length, *shape[axis + 1 :])) for start, length in parts
    ]


def _transpose(node: ir.Node, shape: tuple[int, ...]) -> list[Result]:
    axes = tuple(node.attributes["perm"].as_ints())
    return [(("permute", axes), tuple(shape[axis] for axis in axes))]


def _constant(value: ir.Value) -> tuple[int, ...]:
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None, f"{value.name} is not constant"
    return tuple(int(n) for n in tensor.numpy())


_STEPS = {"Reshape": _reshape, "Split": _split, "Transpose": _transpose}

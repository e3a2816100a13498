"""Builds a graph from its pieces: traces each kind once and copies it for every piece of that kind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir
from torch import nn

from vl2.export.pieces import Piece
from vl2.export.trace import DOMAIN, OPSET, trace
from vl2.export.weights import Weight
from vl2.manifest import Graph, Port

_TYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64, "bool": ir.DataType.BOOL}


@dataclass(frozen=True)
class TracedGraph:
    """An ONNX model whose weights are initializers without data: `weights` says what each holds, by its name."""

    model: ir.Model
    weights: dict[str, Weight]


def assemble(graph: Graph, pieces: Iterable[Piece], model: nn.Module) -> TracedGraph:
    """The traced graph with the ports of `graph`. model: holds the parameters of all pieces, by which weights are named."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inputs = [_input(port) for port in graph.inputs]
    values, weights = {value.name: value for value in inputs}, {}
    whole = ir.Graph(inputs, [], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name=graph.file.partition(".")[0])
    kinds: dict[str, ir.Graph] = {}
    for number, piece in enumerate(pieces):
        local = {name: names[id(parameter)] for name, parameter in piece.module.named_parameters()}
        if piece.kind not in kinds:
            kinds[piece.kind] = trace(piece.module, piece.inputs, piece.outputs).graph
        copy = kinds[piece.kind].clone()
        _connect(copy, [values[port.name] for port in piece.inputs])
        _share_weights(copy, whole, weights, {name: (local[name], piece.module.get_parameter(name)) for name in local})
        _rename(copy, f"{number}.", piece.outputs)
        values |= {value.name: value for value in copy.outputs}
        _move(copy, whole, f"{number}.")
    whole.outputs.extend(values[port.name] for port in graph.outputs)
    return TracedGraph(ir.Model(whole, ir_version=10), weights)


def _input(port: Port) -> ir.Value:
    return ir.Value(name=port.name, type=ir.TensorType(_TYPES[port.dtype]), shape=ir.Shape(port.shape))


def _connect(copy: ir.Graph, values: list[ir.Value]) -> None:
    for taken, given in zip(copy.inputs, values, strict=True):
        taken.replace_all_uses_with(given)


def _share_weights(copy: ir.Graph, whole: ir.Graph, weights: dict[str, Weight], parameters: dict) -> None:
    """Makes the copy read the whole graph's initializers. parameters: local name to (the model's name, parameter)."""
    for local, (name, parameter) in parameters.items():
        taken = copy.initializers.pop(local, None)
        if taken is None or not taken.uses():
            continue
        shape = tuple(parameter.shape)
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        whole.initializers.add(value)
        weights[name] = Weight(name, shape)
        taken.replace_all_uses_with(value)


def _rename(copy: ir.Graph, prefix: str, outputs: tuple[Port, ...]) -> None:
    for node in copy:
        node.name = f"{prefix}{node.name}"
        for value in node.outputs:
            value.name = f"{prefix}{value.name}"
    for value, port in zip(copy.outputs, outputs, strict=True):
        value.name = port.name


def _move(copy: ir.Graph, whole: ir.Graph, prefix: str) -> None:
    copy.outputs.clear()
    for name in list(copy.initializers):
        constant = copy.initializers.pop(name)
        if constant.uses():
            constant.name = f"{prefix}{name}"
            whole.initializers.add(constant)
    nodes = list(copy)
    copy.remove(nodes)
    whole.extend(nodes)

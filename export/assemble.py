"""Builds a graph from its pieces: traces each kind once and copies it for every piece of that kind."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import lru_cache

import onnx_ir as ir
import torch
from torch import nn

from vl2.config import ModelConfig
from vl2.export.graphs import declare_graphs
from vl2.export.pieces import Piece, pieces_of
from vl2.export.trace import DOMAIN, NATIVE, OPSET, STANDARD, trace
from vl2.export.weights import Weight
from vl2.manifest import Port
from vl2.model.vl2 import DeepseekVL2

_TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8,
          "int64": ir.DataType.INT64, "bool": ir.DataType.BOOL}  # fmt: skip


@dataclass(frozen=True)
class TracedGraph:
    """An ONNX model whose weights are initializers without data: `weights` says what each holds, by its name."""

    model: ir.Model
    weights: dict[str, Weight]


def assemble(name: str, config: ModelConfig, kv_cache: str | None = None) -> TracedGraph:
    """The traced graph of a name in `declare_graphs`; with a kv_cache of operators that `plugins/` has kernels for."""
    with torch.device("meta"):
        model = DeepseekVL2(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    graph = declare_graphs(config, kv_cache)[name]
    inputs = [_input(port) for port in graph.inputs]
    values, weights = {value.name: value for value in inputs}, {}
    whole = ir.Graph(inputs, [], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name=graph.file.partition(".")[0])
    kinds: dict[str, ir.Graph] = {}
    for number, piece in enumerate(pieces_of(name, model, kv_cache)):
        if piece.kind not in kinds:
            kinds[piece.kind] = _traced(_kind(name, config, piece, kv_cache is not None))
        copy = kinds[piece.kind].clone()
        _connect(copy, [values[port.name] for port in piece.inputs])
        _share_weights(copy, whole, weights, _model_names(piece, names))
        _rename(copy, f"{number}.", piece.outputs)
        values |= {value.name: value for value in copy.outputs}
        _move(copy, whole, f"{number}.")
    whole.outputs.extend(values[port.name] for port in graph.outputs)
    return TracedGraph(ir.Model(whole, ir_version=10), weights)


@dataclass(frozen=True)
class _Kind:
    """All that a trace depends on. The module is made of `settings` and adds nothing to compare."""

    name: str
    settings: tuple
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    native: bool
    module: nn.Module = field(compare=False)


def _kind(graph: str, config: ModelConfig, piece: Piece, native: bool) -> _Kind:
    """Neither how weights are stored nor, for images, the decoder's settings change what is traced."""
    unseen = {"quantization_config", "language_config"} if graph == "vision" else {"quantization_config"}
    settings = tuple(getattr(config, part.name) for part in fields(config) if part.name not in unseen)
    native = native and any(type(module) in NATIVE for module in piece.module.modules())
    return _Kind(f"{graph}.{piece.kind}", settings, piece.inputs, piece.outputs, native, piece.module)


@lru_cache(maxsize=64)
def _traced(kind: _Kind) -> ir.Graph:
    """Kept, because layers of a model and schemes of a checkpoint share it. Copy before use."""
    # a trace substitutes modules in its own copy
    return trace(deepcopy(kind.module), kind.inputs, kind.outputs, NATIVE if kind.native else STANDARD).graph


def _model_names(piece: Piece, names: dict[int, str]) -> dict[str, Weight]:
    """What each parameter of a piece is in the model, by its name in the piece."""
    parameters = piece.module.named_parameters()
    return {local: Weight(names[id(parameter)], tuple(parameter.shape)) for local, parameter in parameters}


def _input(port: Port) -> ir.Value:
    return ir.Value(name=port.name, type=ir.TensorType(_TYPES[port.dtype]), shape=ir.Shape(port.shape))


def _connect(copy: ir.Graph, values: list[ir.Value]) -> None:
    for taken, given in zip(copy.inputs, values, strict=True):
        taken.replace_all_uses_with(given)


def _share_weights(copy: ir.Graph, whole: ir.Graph, weights: dict[str, Weight], parameters: dict[str, Weight]) -> None:
    """Makes the copy read the whole graph's initializers, which are named as the model's parameters."""
    for local, weight in parameters.items():
        taken = copy.initializers.pop(local, None)
        if taken is None or not taken.uses():
            continue
        name = weight.parameter
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(weight.shape))
        whole.initializers.add(value)
        weights[name] = weight
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

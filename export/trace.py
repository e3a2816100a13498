"""From a PyTorch module to ONNX nodes, with no weight in memory: the module lives on the meta device.

The traced graph holds standard operators and two of our own, which lowerings replace or keep:
`vl2::Linear(x [..., K], weight [N, K], bias [N]?)` and `vl2::Experts` (see `vl2.plugins.experts.op`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset
from torch import nn

from vl2.export.passes.fold_constants import fold_constants
from vl2.export.weights import Weight
from vl2.manifest import Graph, Port
from vl2.plugins.experts import op as experts_op

# Newest opset that every ONNX Runtime from 1.20 on and TensorRT from 10.3 on reads.
OPSET = 20
DOMAIN = "vl2"

# Sizes for tracing: distinct, so that no two sides are taken for one; past and new tokens of 0 and 1 are tested.
_SIZES = {"batch": 2, "tokens": 3, "past": 5, "total": 8, "tiles": 2}
_DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}


@dataclass(frozen=True)
class TracedGraph:
    """An ONNX model whose weights are initializers without data: `weights` says what each holds, by its name."""

    model: ir.Model
    weights: dict[str, Weight]


def trace(module: nn.Module, graph: Graph) -> TracedGraph:
    """Traces a module on the meta device (of `graphs.MODULES`) with the ports of `graph`."""
    experts_op.substitute_experts(module)
    inputs = tuple(_sample(port) for port in graph.inputs)
    dynamic = tuple(_dynamic_sides(port) for port in graph.inputs)
    # a variadic forward takes its dynamic shapes as one nested tuple
    fixed = len(graph.inputs) - len(graph.cache)
    shapes = (*dynamic[:fixed], dynamic[fixed:]) if graph.cache else dynamic
    with _quiet(), torch.no_grad():
        program = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=False)
        translated = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            custom_translation_table=_TRANSLATIONS,
            input_names=[port.name for port in graph.inputs],
            output_names=[port.name for port in graph.outputs],
        )
    model = translated.model
    _name_sides(model, graph)
    weights = _detach_weights(model, module)
    fold_constants(model, weights)
    return TracedGraph(model, weights)


def _sample(port: Port) -> torch.Tensor:
    shape = [_SIZES[side] if isinstance(side, str) else side for side in port.shape]
    return torch.empty(shape, dtype=_DTYPES[port.dtype], device="meta")


def _dynamic_sides(port: Port) -> dict[int, object]:
    # total = past + tokens is found by the tracer itself
    return {axis: torch.export.Dim.DYNAMIC for axis, side in enumerate(port.shape) if isinstance(side, str)}


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's warnings are about packages and internals that no user can mend; errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _operator(name: str, inputs: dict[str, str], optional: tuple[str, ...] = ()) -> Op:
    """A node type of our domain; inputs: name to element type."""
    option = OpSchema.FormalParameterOption
    parameters = [
        OpSchema.FormalParameter(
            name, f"tensor({dtype})", param_option=option.Optional if name in optional else option.Single
        )
        for name, dtype in inputs.items()
    ]
    schema = OpSchema(
        name, DOMAIN, 1, inputs=parameters, outputs=[OpSchema.FormalParameter("y", "tensor(float)")]
    )
    return Op(Opset(DOMAIN, 1), name, schema)


_LINEAR = _operator("Linear", {"x": "float", "weight": "float", "bias": "float"}, optional=("bias",))
_EXPERTS = _operator(experts_op.OP_TYPE, experts_op.INPUTS)


def _linear(x, weight, bias=None):
    return _LINEAR(x, weight) if bias is None else _LINEAR(x, weight, bias)


def _experts(*inputs):
    return _EXPERTS(*inputs)


_TRANSLATIONS = {torch.ops.aten.linear.default: _linear, torch.ops.vl2.experts.default: _experts}


def _name_sides(model: ir.Model, graph: Graph) -> None:
    """Gives the tracer's symbols (s10, s1 + s29) the names of the ports, everywhere in the graph."""
    names: dict[str, str] = {}
    for value, port in zip(model.graph.inputs, graph.inputs, strict=True):
        for found, side in zip(value.shape, port.shape, strict=True):
            if isinstance(side, str):
                names[str(found.value)] = side
    for value in _values(model):
        if value.shape is not None:
            sides = [_renamed(side, names) for side in value.shape]
            value.shape = ir.Shape(sides)


def _renamed(side: int | ir.SymbolicDim, names: dict[str, str]) -> int | ir.SymbolicDim:
    # other expressions (such as batch·tokens) stay nameless: a reader gains nothing from the tracer's symbols
    return side if isinstance(side, int) else ir.SymbolicDim(names.get(str(side.value)))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _detach_weights(model: ir.Model, module: nn.Module) -> dict[str, Weight]:
    """Takes the (meta) tensors out of the parameters' initializers; returns what each holds."""
    weights = {}
    parameters = dict(module.named_parameters())
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]
        elif name in parameters:
            value.const_value = None
            weights[name] = Weight(name, tuple(parameters[name].shape))
    return weights

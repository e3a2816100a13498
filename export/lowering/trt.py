"""The `trt` lowering: what TensorRT 10.3 and later parse and build, strongly typed in float16.

Standard nodes of opset 20 and four of domain `vl2` that plugins compute: Experts (routing included), LatentAttention,
Attention (both write their cache in place) and Linear, for quantized matrices. plugins/tensorrt/README.md lists their
inputs and attributes. Every weight of the decoder is an input of the graph, bound from the bundle's weight file; those
of the tower are initializers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from vl2.engine_record import written_name
from vl2.errors import VL2Error
from vl2.export.assemble import TracedGraph
from vl2.export.engine_storage import PART_NAMES
from vl2.export.lowering.cpu import EXPERTS_RENAMED
from vl2.export.lowering.nodes import Scope
from vl2.export.lowering.portable import apply_lowerings, drop_unread
from vl2.export.packed_storage import PackedStorage
from vl2.export.passes.halve import Precision, halve
from vl2.export.passes.store_weights import PlacedWeight
from vl2.export.storing import Storing
from vl2.export.trace import DOMAIN
from vl2.export.weights import Weight
from vl2.plugins.attention import op as attention_op
from vl2.plugins.experts import moe
from vl2.plugins.latent_attention import op as latent_attention_op

PLUGIN_VERSION = "1"
# Safetensors files have no gaps: weights come first that leave the next one where a GPU's loads begin.
_ALIGNMENT = 64

_ATTENTIONS = {op.OP_TYPE: op.INPUTS for op in (attention_op, latent_attention_op)}
_TABLES = ("cos", "sin")
_DECODER = Precision(
    half=frozenset({"MatMul", "Gemm", "Linear", "Experts", *_ATTENTIONS}),
    # routing is decided in float32: of experts' inputs x alone is cast
    untouched={"Experts": frozenset(range(1, 32)), **{name: frozenset(map(inputs.index, _TABLES))
                                                for name, inputs in _ATTENTIONS.items()}},
)  # fmt: skip
_VISION = Precision(half=frozenset({"MatMul", "Conv", "DequantizeLinear"}),
                    following=frozenset({"Softmax", "Gelu", "Mul", "Add"}))  # fmt: skip


@dataclass(frozen=True)
class _Weights:
    """The graph's weights under construction: `placed` gets every part that a node reads."""

    graph: ir.Graph
    traced: dict[str, Weight]
    storing: Storing
    placed: dict[str, PlacedWeight]

    def parts(self, value: ir.Value) -> list[ir.Value]:
        """The values that stand for a weight: itself, or codes and scales."""
        weight = self.traced[value.name]
        return [self._part(value, weight, storage) for storage in self.storing.parts_of(weight.parameter)]

    def form(self, value: ir.Value, prefix: str = "") -> dict[str, str | int]:
        """The attributes that say how a matrix lies."""
        storage = self.storing.parts_of(self.traced[value.name].parameter)[0]
        packed = isinstance(storage, PackedStorage)
        scheme = f"int{storage.packing.form.bits}" if packed else "fp16"
        return {f"{prefix}scheme": scheme, f"{prefix}group_size": storage.packing.group_size if packed else 0}

    def is_packed(self, value: ir.Value) -> bool:
        """Whether it lies in codes and scales."""
        return self.form(value)["scheme"] != "fp16"

    def transposed(self, value: ir.Value) -> ir.Value:
        """A matrix [N, K] as a new initializer [K, N]."""
        weight, name = self.traced[value.name], f"{value.name}.transposed"
        self.traced[name] = weight.then(("permute", (1, 0)), weight.shape[::-1])
        made = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(weight.shape[::-1]))
        self.graph.initializers.add(made)
        return made

    def _part(self, value: ir.Value, weight: Weight, storage) -> ir.Value:
        packed = isinstance(storage, PackedStorage)
        name = f"{value.name.removesuffix('.weight')}.{PART_NAMES[storage.part]}" if packed else value.name
        place = PlacedWeight(name, weight, storage, 0)
        if packed and name not in self.graph.initializers:
            self.graph.initializers.add(ir.Value(name=name))
        made = self.graph.initializers[name]
        made.type, made.shape = ir.TensorType(storage.onnx_dtype), ir.Shape(place.shape)
        self.placed[name] = place
        return made


def lower_decoder(traced: TracedGraph, storing: Storing) -> tuple[ir.Model, list[PlacedWeight]]:
    """The decoder with its weights as inputs, and their places behind the header of a safetensors file."""
    weights = _Weights(traced.model.graph, dict(traced.weights), storing, {})
    lowerings = {"Linear": _InputLinear(weights), "MoE": _Experts(weights)}
    lowerings |= {name: _Attention(weights) for name in _ATTENTIONS}
    return _lower(traced.model, weights, lowerings, _DECODER), _as_inputs(traced.model.graph, weights)


def lower_vision(traced: TracedGraph, storing: Storing) -> tuple[ir.Model, dict[str, PlacedWeight]]:
    """The tower and projector, and the parts that its initializers hold, by name, not yet placed in a file."""
    weights = _Weights(traced.model.graph, dict(traced.weights), storing, {})
    model = _lower(traced.model, weights, {"Linear": _ConstantLinear(weights)}, _VISION)
    return model, {name: place for name, place in weights.placed.items() if name in model.graph.initializers}


def _lower(model: ir.Model, weights: _Weights, lowerings: dict, precision: Precision) -> ir.Model:
    graph = model.graph
    # rows of zero tokens are never asked for
    apply_lowerings(graph, lowerings)
    drop_unread(graph, weights.traced)
    for name in weights.traced:
        weights.parts(graph.initializers[name])
    halve(graph, precision)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    if not any(node.domain == DOMAIN for node in graph):
        model.opset_imports.pop(DOMAIN, None)
    return model


def _as_inputs(graph: ir.Graph, weights: _Weights) -> list[PlacedWeight]:
    """Moves the weights from the initializers to the inputs, in the order of the file."""
    places = [place for name, place in weights.placed.items() if name in graph.initializers]
    placed, end = [], 0
    for place in sorted(places, key=lambda place: place.size_bytes % _ALIGNMENT != 0):
        placed.append(PlacedWeight(place.name, place.weight, place.storage, end))
        end = placed[-1].end
        graph.inputs.append(graph.initializers.pop(place.name))
    return placed


class _ConstantLinear:
    """MatMul by the transposed matrix and Add: what TensorRT fuses with what is around it. INT8 codes stay codes, which
    DequantizeLinear multiplies by a scale a column."""

    def __init__(self, weights: _Weights) -> None:
        self._weights = weights

    def __call__(self, scope: Scope, node: ir.Node) -> ir.Value:
        x, weight, bias = (*node.inputs, None)[:3]
        matrix = self._weights.transposed(weight)
        if self._weights.is_packed(matrix):
            matrix = _float(scope.op("DequantizeLinear", self._weights.parts(matrix), axis=1))
        y = scope.op("MatMul", [x, matrix])
        return _float(y if bias is None else scope.op("Add", [_float(y), bias]))


class _InputLinear:
    """Gemm for float matrices, read as they lie ([N, K], transB); `vl2::Linear` for quantized ones."""

    def __init__(self, weights: _Weights) -> None:
        self._weights = weights

    def __call__(self, scope: Scope, node: ir.Node) -> ir.Value:
        x, weight, bias = (*node.inputs, None)[:3]
        y = self._product(scope, x, weight)
        return y if bias is None else _float(scope.op("Add", [y, bias]))

    def _product(self, scope: Scope, x: ir.Value, weight: ir.Value) -> ir.Value:
        size, inner = weight.shape
        if self._weights.is_packed(weight):
            inputs = [x, *self._weights.parts(weight)]
            return _float(_plugin(scope, "Linear", inputs, {"N": size, "K": inner, **self._weights.form(weight)}))
        if len(x.shape) == 2:
            return _float(scope.op("Gemm", [x, weight], transB=1))
        rows = _float(scope.op("Flatten", [x], axis=len(x.shape) - 1))
        y = _float(scope.op("Gemm", [rows, weight], transB=1))
        sides = scope.op("Shape", [x], start=0, end=len(x.shape) - 1)
        shape = scope.op("Concat", [sides, scope.constant(np.array([size], np.int64))], axis=0)
        return _float(scope.op("Reshape", [y, shape]))


class _Experts:
    """Routing, routed and shared experts; what a layer does not have is left out and named by an attribute."""

    def __init__(self, weights: _Weights) -> None:
        self._weights = weights

    def __call__(self, scope: Scope, node: ir.Node) -> ir.Value:
        given = dict(zip(moe.INPUTS, (*node.inputs, *[None] * len(moe.INPUTS)), strict=False))
        experts, inner, hidden = given["gate_proj"].shape
        shared = given["shared_gate_proj"]
        attributes = {"hidden_size": hidden, "inner_size": inner, "experts": experts,
                      "shared_size": 0 if shared is None else shared.shape[0]}  # fmt: skip
        attributes |= {EXPERTS_RENAMED.get(name, name): node.attributes[name].value for name in moe.RULE}
        inputs = [given["x"], given["logits"]]
        for prefix, gate, up, down in (("", "gate_proj", "up_proj", "down_proj"),
                                       ("shared_", "shared_gate_proj", "shared_up_proj", "shared_down_proj")):
            if prefix and given["correction_bias"] is not None:
                inputs.append(given["correction_bias"])
            if given[gate] is None:
                attributes |= {"shared_scheme": "fp16", "shared_group_size": 0, "shared_down_scheme": "fp16",
                               "shared_down_group_size": 0}  # fmt: skip
                continue
            form = self._weights.form(given[gate], prefix)
            if form != self._weights.form(given[up], prefix):
                raise VL2Error(f"`{given[gate].name}` and `{given[up].name}` are quantized in two ways",
                               "engines read both in one pass: give them one scheme")  # fmt: skip
            attributes |= form | self._weights.form(given[down], f"{prefix}down_")
            inputs += [part for name in (gate, up, down) for part in self._weights.parts(given[name])]
        return _float(_plugin(scope, "Experts", inputs, attributes))


class _Attention:
    """The attention that writes its caches: they are outputs as well, to be bound to the inputs' addresses."""

    def __init__(self, weights: _Weights) -> None:
        self._graph = weights.graph

    def __call__(self, scope: Scope, node: ir.Node) -> ir.Value:
        y = _plugin(scope, node.op_type, list(node.inputs), {"scale": node.attributes["scale"].value})
        made = scope.nodes[-1]
        caches = [value for value, name in zip(node.inputs, _ATTENTIONS[node.op_type], strict=False)
                  if name.endswith("cache")]  # fmt: skip
        made.resize_outputs(1 + len(caches))
        for cache, written in zip(caches, made.outputs[1:], strict=True):
            written.name, written.type, written.shape = written_name(cache.name), cache.type, cache.shape
            self._graph.outputs.append(written)
        return _float(y)


def _plugin(scope: Scope, op_type: str, inputs: list[ir.Value], attributes: dict) -> ir.Value:
    # before TensorRT 10.10 the namespace is not read from the domain
    named = {"plugin_namespace": DOMAIN, "plugin_version": PLUGIN_VERSION}
    return scope.op(op_type, inputs, domain=DOMAIN, **named, **attributes)


def _float(value: ir.Value) -> ir.Value:
    """Types a new value as the graph around it still is; `halve` changes it."""
    value.type = ir.TensorType(ir.DataType.FLOAT)
    return value

"""Gives every weight its place in the data file and, where it is stored narrower, a Cast to float32 at each use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from vl2.export.passes.widen_weights import Widening
from vl2.export.schemes import FLOAT32, Storage, storage_of
from vl2.export.weights import Weight

# A page: onnxruntime maps each big tensor by itself. Rows of a stack follow each other unpadded wherever
# their size is a multiple of _ROW_ALIGNMENT, so that the stack is one tensor as well.
_ALIGNMENT = 4096
_ROW_ALIGNMENT = 64


@dataclass(frozen=True)
class PlacedWeight:
    """A weight and where its numbers lie in the data file."""

    name: str
    weight: Weight
    storage: Storage
    offset: int

    @property
    def size_bytes(self) -> int:
        return self.weight.elements * self.storage.element_bytes

    @property
    def end(self) -> int:
        return self.offset + self.size_bytes


@dataclass(frozen=True)
class DataFile:
    """Where weights are to lie and how: file name, scheme, shapes of the model's parameters."""

    name: str
    scheme: str
    parameter_shapes: Mapping[str, tuple[int, ...]]


def store_weights(model: ir.Model, weights: Mapping[str, Weight], data: DataFile) -> list[PlacedWeight]:
    """Turns the initializers of `weights` into references to the data file; returns them in the order of the file."""
    placed, end, widening = [], 0, Widening()
    for name, weight in weights.items():
        storage = storage_of(weight.parameter, data.parameter_shapes[weight.parameter], data.scheme)
        alignment = _ROW_ALIGNMENT if weight.expert else _ALIGNMENT
        place = PlacedWeight(name, weight, storage, -(-end // alignment) * alignment)
        placed.append(place)
        end = place.end
        value = model.graph.initializers[name]
        if storage is not FLOAT32:
            widening.widen(value)
        value.type = ir.TensorType(storage.onnx_dtype)
        value.const_value = ir.ExternalTensor(
            data.name, place.offset, place.size_bytes, storage.onnx_dtype, shape=ir.Shape(weight.shape), name=name
        )
    return placed


def all_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph and those inside its control-flow nodes."""
    yield graph
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from all_graphs(attribute.as_graph())

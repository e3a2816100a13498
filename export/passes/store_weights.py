"""Gives every weight its place in the data file, and its readers what makes float32 of what is stored."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from vl2.export.native_storage import NativeStorage
from vl2.export.packed_storage import COUNTED, PackedStorage
from vl2.export.passes.use_packed import PackedUses
from vl2.export.passes.widen_weights import Widening
from vl2.export.schemes import Storage
from vl2.export.storing import FLOATS, MULTIPLY, NATIVE, NBITS, Storing
from vl2.export.weights import Weight

# A page: onnxruntime maps each big tensor by itself. Rows of a stack follow each other unpadded wherever
# their size is a multiple of _ROW_ALIGNMENT, so that the stack is one tensor as well.
_ALIGNMENT = 4096
_ROW_ALIGNMENT = 64


@dataclass(frozen=True)
class PlacedWeight:
    """A weight, or a part of a quantized one, and where it lies in the data file."""

    name: str
    weight: Weight
    storage: Storage | PackedStorage | NativeStorage
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.storage.shape_of(self.weight.shape, self.weight.input_axis)

    @property
    def size_bytes(self) -> int:
        return self.storage.size_bytes(self.weight.shape, self.weight.input_axis)

    @property
    def end(self) -> int:
        return self.offset + self.size_bytes

    @property
    def parameters(self) -> int:
        """Of the weight; of its several parts one has them, so that they are counted once."""
        if isinstance(self.storage, NativeStorage):
            return self.weight.elements * (1 if self.storage.partner is None else 2)
        counted = isinstance(self.storage, Storage) or self.storage.part in COUNTED
        return self.weight.elements if counted else 0


@dataclass(frozen=True)
class DataFile:
    """Where weights are to lie and how."""

    name: str
    storing: Storing


def store_weights(model: ir.Model, weights: Mapping[str, Weight], data: DataFile) -> list[PlacedWeight]:
    """Turns the initializers of `weights` into references to the data file; returns them in the order of the file."""
    placed, end, widening = [], 0, Widening()
    uses = PackedUses(model.graph, widening)
    # the experts of a stack, or the blocks of a vocabulary, stand next to each other
    for parameter, group in itertools.groupby(weights.items(), lambda item: item[1].parameter):
        members = list(group)
        values: dict[str, list[ir.Value]] = {name: [] for name, _ in members}
        for storage in data.storing.parts_of(parameter):
            for name, weight in members:
                part = f"{name}/{storage.part}" if isinstance(storage, PackedStorage) else name
                alignment = _ROW_ALIGNMENT if weight.expert else _ALIGNMENT
                place = PlacedWeight(part, weight, storage, -(-end // alignment) * alignment)
                placed.append(place)
                end = place.end
                values[name].append(_reference(model.graph, place, data.name))
        for name, weight in members:
            _rewrite(uses, widening, model.graph.initializers[name], (values[name], weight, data.storing))
    return placed


def _reference(graph: ir.Graph, place: PlacedWeight, file: str) -> ir.Value:
    """The initializer of a place, which exists already where a weight is stored as one part."""
    dtype, shape = place.storage.onnx_dtype, ir.Shape(place.shape)
    value = graph.initializers.get(place.name)
    if value is None:
        value = ir.Value(name=place.name)
    value.type, value.shape = ir.TensorType(dtype), shape
    value.const_value = ir.ExternalTensor(file, place.offset, place.size_bytes, dtype, shape=shape, name=place.name)
    graph.initializers.add(value)
    return value


def _rewrite(uses: PackedUses, widening: Widening, value: ir.Value, facts: tuple) -> None:
    """Lets the readers of a weight read what is stored of it."""
    parts, weight, storing = facts
    use = storing.use_of(weight.parameter)
    if use == NATIVE:
        return
    if use == FLOATS:
        if value.dtype != ir.DataType.FLOAT:
            widening.widen(value)
        return
    packing = storing.parts_of(weight.parameter)[0].packing
    if use == NBITS:
        uses.multiply_packed(value, parts, packing)
    elif use == MULTIPLY:
        uses.multiply(value, parts, packing)
    else:
        uses.dequantize(value, parts, packing, weight.input_axis)
    del value.graph.initializers[value.name]


def all_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph and those inside its control-flow nodes."""
    yield graph
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from all_graphs(attribute.as_graph())

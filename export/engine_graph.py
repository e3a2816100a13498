"""The graphs of the `trt` lowering with their weights placed: in a data file, the decoder's in safetensors."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from vl2.config import ModelConfig
from vl2.engine_record import written_name
from vl2.export.assemble import assemble
from vl2.export.lowering.trt import lower_decoder, lower_vision
from vl2.export.passes.arrange_weights import arrange_weights
from vl2.export.passes.store_weights import DataFile, PlacedWeight
from vl2.manifest import Graph, Port

# In the decoder's place in the manifest: each tensor of the file is an input of the graph by its name.
WEIGHTS_FILE = "decoder.safetensors"
_ALIGNMENT = 4096


def engine_graphs(graphs: dict[str, Graph]) -> dict[str, Graph]:
    """The declared graphs with caches written in place as the `trt` lowering has them: caches are outputs as well."""
    decoder = graphs["decoder"]
    types = {port.name: port for port in decoder.inputs}
    written = (replace(types[ports.past], name=written_name(ports.past)) for ports in decoder.cache)
    return {**graphs, "decoder": replace(decoder, data_file=WEIGHTS_FILE, outputs=(*decoder.outputs, *written))}


def build_engine_graph(name: str, config: ModelConfig, data: DataFile) -> tuple[ir.Model, list[PlacedWeight]]:
    """As `to_onnx.build_graph`."""
    # the tower's attention stays standard: engines fuse it themselves
    traced = assemble(name, config, data.storing.kv_cache if name == "decoder" else None)
    arrange_weights(traced.model, traced.weights)
    if name == "decoder":
        return lower_decoder(traced, data.storing)
    model, places = lower_vision(traced, data.storing)
    return model, _place(model.graph, places, data.name)


def _place(graph: ir.Graph, places: dict[str, PlacedWeight], file: str) -> list[PlacedWeight]:
    placed, end = [], 0
    for name, place in places.items():
        placed.append(replace(place, offset=-(-end // _ALIGNMENT) * _ALIGNMENT))
        end = placed[-1].end
        dtype, shape = place.storage.onnx_dtype, ir.Shape(place.shape)
        graph.initializers[name].const_value = ir.ExternalTensor(
            file, placed[-1].offset, place.size_bytes, dtype, shape=shape, name=name
        )
    return placed


def weight_ports(placed: list[PlacedWeight]) -> tuple[Port, ...]:
    """The inputs that weights are."""
    names = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.INT8: "int8"}
    return tuple(Port(place.name, names[place.storage.onnx_dtype], place.shape) for place in placed)

"""From a checkpoint's configuration to the ONNX model of one graph: traced, rewritten, lowered, its weights placed."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from vl2.config import ModelConfig
from vl2.export.assemble import assemble
from vl2.export.engine_graph import build_engine_graph, weight_ports
from vl2.export.lowering import cpu, portable
from vl2.export.passes.arrange_weights import arrange_weights
from vl2.export.passes.store_weights import DataFile, PlacedWeight, all_graphs, store_weights
from vl2.export.passes.use_packed import MICROSOFT
from vl2.export.storing import CPU, TRT
from vl2.manifest import Graph

# What onnxruntime 1.20 reads, with opsets 20 and 21.
_IR_VERSION = 10
# DequantizeLinear in blocks and INT4 begin here; onnxruntime reads it from 1.20 on. No node of ours changed since 20.
PACKED_OPSET = 21


def build_graph(name: str, config: ModelConfig, data: DataFile) -> tuple[ir.Model, list[PlacedWeight]]:
    """The model of a graph, without data, and its weights in the order of the data file."""
    if data.storing.lowering == TRT:
        model, placed = build_engine_graph(name, config, data)
        _finish(model)
        return model, placed
    native = data.storing.lowering == CPU
    traced = assemble(name, config, data.storing.kv_cache)
    arrange_weights(traced.model, traced.weights)
    lowered = cpu.lower(traced, data.storing) if native else portable.lower(traced)
    placed = store_weights(lowered.model, lowered.weights, data)
    if data.storing.forms:
        lowered.model.opset_imports[""] = PACKED_OPSET
    if any(node.domain == MICROSOFT for graph in all_graphs(lowered.model.graph) for node in graph):
        lowered.model.opset_imports[MICROSOFT] = 1
    _finish(lowered.model)
    return lowered.model, placed


def _finish(model: ir.Model) -> None:
    """Drops the tracer's notes (they hold paths of this machine) and says who made the file."""
    model.producer_name, model.producer_version = "vl2", None
    model.ir_version = _IR_VERSION
    model.metadata_props.clear()
    for graph in all_graphs(model.graph):
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def check_graph(path: Path, graph: Graph, placed: list[PlacedWeight]) -> None:
    """onnx.checker and shape inference on the written file, its weights in place, and the ports as declared.

    Weights that are inputs stand behind the others.

    Failures are defects of the exporter, not of the user's files.
    """
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(str(path), load_external_data=False)
    weights = weight_ports(placed) if len(proto.graph.input) > len(graph.inputs) else ()
    for ports, values in (((*graph.inputs, *weights), proto.graph.input), (graph.outputs, proto.graph.output)):
        found = [(value.name, _sides(value)) for value in values]
        assert found == [(port.name, port.shape) for port in ports], f"{path} has the ports {found}"


def _sides(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim)

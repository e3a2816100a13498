"""Graphs of one plugin node, and TensorRT-RTX where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from vl2.plugins.tensorrt.build import EngineJob
from vl2.plugins.tensorrt.engines import EngineSizes, profiles
from vl2.plugins.tensorrt.flavour import RTX, is_installed
from vl2.plugins.tensorrt.operators import NAMESPACE, OPERATORS, VERSION

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8,
         "int64": TensorProto.INT64}  # fmt: skip
LINEAR = {"N": 64, "K": 128, "scheme": "int4", "group_size": 32}
LINEAR_INPUTS = {"x": ("float16", ["tokens", 128]), "weight": ("int8", [64, 64]), "weight_scale": ("float16", [64, 4])}


@pytest.fixture(scope="session")
def rtx() -> str:
    """The flavour TensorRT-RTX; skips where it is not installed."""
    if not is_installed(RTX):
        pytest.skip("tensorrt-rtx is not installed: pip install '.[engine]'")
    return RTX


def published_decoder(folder: Path, variant: str, scheme: str, flavour: str) -> EngineJob:
    """The decoder of a published size cut to its dense and one MoE layer; weights are inputs, so it needs none."""
    import onnx_ir

    from benchmarks.engine_build import shortened, storing_for
    from vl2.export.engine_graph import build_engine_graph, engine_graphs
    from vl2.export.graphs import declare_graphs
    from vl2.export.passes.store_weights import DataFile

    config = shortened(variant, 2, 1)
    storing = storing_for(config, scheme)
    graph = engine_graphs(declare_graphs(config, storing.kv_cache))["decoder"]
    model, _ = build_engine_graph("decoder", config, DataFile(graph.data_file, storing))
    model.ir_version = 10
    onnx_ir.save(model, folder / graph.file)
    ranges = profiles("decoder", graph, EngineSizes(context=4096, prefill_chunk=512))
    return EngineJob(str(folder / graph.file), str(folder / "engine"), flavour, ("8.9",), ranges)


@pytest.fixture
def one_node(tmp_path: Path) -> Callable[..., str]:
    """`one_node(operator, attributes, inputs)`: path of a graph of one plugin node; inputs: name to dtype and shape."""

    def write(operator: str, attributes: dict, inputs: dict[str, tuple[str, list]]) -> str:
        named = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION, **attributes}
        outputs = [tensor.name for tensor in OPERATORS[operator].outputs]
        node = helper.make_node(operator, list(inputs), outputs, domain=NAMESPACE, **named)
        taken = [helper.make_tensor_value_info(name, TYPES[dtype], shape) for name, (dtype, shape) in inputs.items()]
        given = [helper.make_tensor_value_info(outputs[0], TensorProto.FLOAT16, None)]
        graph = helper.make_graph([node], "one", taken, given)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(NAMESPACE, 1)])
        model.ir_version = 10
        onnx.save(model, tmp_path / "one.onnx")
        return str(tmp_path / "one.onnx")

    return write

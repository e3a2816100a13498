"""One operator through the portable lowering into onnxruntime, with weights in the file."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
from torch import Tensor, nn

from vl2.export.assemble import TracedGraph
from vl2.export.lowering import portable
from vl2.export.trace import DOMAIN, OPSET, trace
from vl2.export.weights import Weight, arrange
from vl2.manifest import Port


def session_of(module: nn.Module, ports: tuple[tuple[Port, ...], tuple[Port, ...]], weights: dict[str, Tensor]):
    """An onnxruntime session of a module (on the meta device) with these weights, by parameter name."""
    model = trace(module, *ports)
    assert {node.domain for node in model.graph} >= {DOMAIN}
    traced = TracedGraph(model, {name: Weight(name, tuple(tensor.shape)) for name, tensor in weights.items()})
    lowered = portable.lower(traced)
    for name, weight in lowered.weights.items():
        tensor = weights[weight.parameter]
        tensor = arrange(tensor if weight.expert is None else tensor[weight.expert], weight.layout)
        lowered.model.graph.initializers[name].const_value = ir.tensor(np.ascontiguousarray(tensor.numpy()), name=name)
    lowered.model.ir_version = 10
    assert set(lowered.model.opset_imports) == {""} and lowered.model.opset_imports[""] == OPSET
    return onnxruntime.InferenceSession(ir.to_proto(lowered.model).SerializeToString())

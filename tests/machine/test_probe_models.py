"""The hand-written models are what onnx and onnxruntime take them for."""

import onnx
import pytest

from vl2.machine.probe_models import matmul_model, nbits_model
from vl2.machine.providers import session_error
from vl2.runtime.providers import CPU


@pytest.mark.parametrize("model, kind, domain", [(matmul_model(), "MatMul", ""),
                                                 (nbits_model(), "MatMulNBits", "com.microsoft")])
def test_the_probes_are_models_of_one_node_that_the_cpu_computes(model: bytes, kind: str, domain: str) -> None:
    parsed = onnx.load_from_string(model)
    assert [(node.op_type, node.domain) for node in parsed.graph.node] == [(kind, domain)]
    onnx.checker.check_model(parsed)
    assert session_error(model, CPU) is None


def test_a_probe_that_computes_something_else_is_an_error() -> None:
    assert "expected 992.0" in session_error(matmul_model().replace(b"\0\0\0\x40" * 512, b"\0\0\x80\x40" * 512), CPU)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_is_not_there_is_told_from_one_that_works() -> None:
    assert session_error(matmul_model(), "CUDAExecutionProvider")
    assert session_error(b"no model", CPU)

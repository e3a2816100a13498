"""Graphs of one node of the operator library, and matrices in its layout, for tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from vl2.operators import library_path
from vl2.plugins.native.layout import Layout, layout_for, pack, unpack

SPECIAL_INPUTS = ("x", "logits")
LIBRARY, REASON = library_path()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=str(REASON))
_ERRORS_ONLY = 3


def available_isas() -> list[str]:
    """What `VL2_CPU_ISA` may force here."""
    import ctypes

    if LIBRARY is None:
        return []
    names = ctypes.CDLL(str(LIBRARY)).vl2_available_isas
    names.restype = ctypes.c_char_p
    return names().decode().split()


ISAS = available_isas()


def node_session(op: str, tensors: dict[str, np.ndarray | None], attributes: dict, threads: int = 1):
    """A session of one node. tensors: its inputs in order; `x` and `logits` are fed, None is left out, others are
    weights."""
    node = helper.make_node(op, [name if tensor is not None else "" for name, tensor in tensors.items()], ["y"],
                            domain="vl2", **attributes)
    fed = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors if name in SPECIAL_INPUTS]
    held = [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()
            if tensor is not None and name not in SPECIAL_INPUTS]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one", fed, [output], held)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("vl2", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(LIBRARY))
    options.intra_op_num_threads, options.log_severity_level = threads, _ERRORS_ONLY + 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@dataclass(frozen=True)
class Matrix:
    """A random matrix: its layout, bytes and numbers (float32, dequantized)."""

    layout: Layout
    packed: np.ndarray
    numbers: np.ndarray

    @property
    def form(self) -> dict:
        """The attributes that say how it lies."""
        layout = self.layout
        return {"scheme": layout.scheme, "group_size": layout.group_size, "scale_dtype": layout.scale_dtype}


def codes_and_scales(shape: tuple[int, int], scheme: str, groups: int, rng) -> tuple[np.ndarray, np.ndarray | None]:
    """Random numbers as a checkpoint has them, of about 1/√K in all."""
    size = shape[1] ** -0.5
    if scheme == "fp16":
        return (rng.standard_normal(shape) * size).astype(np.float16), None
    if scheme == "bf16":
        return ((rng.standard_normal(shape) * size).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), None
    top = 1 << (int(scheme[3:]) - 1)
    scales = (rng.random((shape[0], groups)) + 0.5) * size * 2 / top
    return rng.integers(-top, top, shape).astype(np.int8), scales.astype(np.float16)


def random_matrix(shape: tuple[int, int], scheme: str, groups: int = 1, seed: int = 0) -> Matrix:
    """A matrix with `groups` scales a row."""
    numbers, scales = codes_and_scales(shape, scheme, groups, np.random.default_rng(seed))
    layout = layout_for(shape, scheme, groups)
    packed = pack(layout, numbers, scales)
    return Matrix(layout, packed, unpack(layout, packed))


def error_of(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """The largest and the mean (RMS) difference, both over the RMS of what is wanted."""
    difference = got.astype(np.float64) - want
    rms = np.sqrt(np.mean(np.square(want))) + 1e-300
    return float(np.abs(difference).max(initial=0) / rms), float(np.sqrt(np.mean(np.square(difference))) / rms)

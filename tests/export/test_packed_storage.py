"""What is stored of a quantized matrix, read by onnxruntime's operators, is its dequantized weight bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from vl2.export.packed_storage import SCALES, block_for
from vl2.export.passes.store_weights import DataFile, PlacedWeight, store_weights
from vl2.export.schemes import FLOAT16
from vl2.export.storing import DEQUANTIZE, MULTIPLY, NBITS, Storing
from vl2.export.to_onnx import PACKED_OPSET
from vl2.export.weights import Weight
from vl2.model.packed import dequantize
from vl2.quantization import Form

ROWS = 6
DECODER, TOWER = "language.layers.0.self_attn.q_proj.weight", "vision.blocks.0.attn.qkv.weight"
# bits, group, inputs; the last has a partial block
FORMS = [(4, 32, 96), (4, 64, 128), (4, 128, 256), (4, 16, 48),
         (8, 128, 128), (8, 16, 48), (8, None, 96), (8, None, 43)]  # fmt: skip


def quantized(bits: int, group: int | None, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(bits * inputs)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.randint(low, high + 1, (ROWS, inputs), generator=generator, dtype=torch.int8)
    codes[0, :2] = torch.tensor([low, high])
    return codes, (torch.rand(ROWS, inputs // (group or inputs), generator=generator) * 0.01 + 0.001).half()


def session_of(storing: Storing, parameter: str, numbers: tuple, bias: np.ndarray | None, folder: Path):
    """One Gemm with the matrix, rewritten and written as an export does; the operators used."""
    codes, scales = numbers
    shape = tuple(codes.shape)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", shape[1]]))
    weight = ir.Value(name=parameter, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    biases = [] if bias is None else [ir.Value(name="bias", const_value=ir.tensor(bias, name="bias"))]
    y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", ROWS]))
    gemm = ir.Node("", "Gemm", [x, weight, *biases], [ir.AttrInt64("transB", 1)], outputs=[y], name="gemm")
    graph = ir.Graph([x], [y], nodes=[gemm], initializers=[weight, *biases],
                     opset_imports={"": PACKED_OPSET, "com.microsoft": 1}, name="g")  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    placed = store_weights(model, {parameter: Weight(parameter, shape)}, DataFile("w.data", storing))
    with (folder / "w.data").open("wb") as file:
        for place in placed:
            file.seek(place.offset)
            file.write(encoded(place, codes, scales))
    ir.save(model, folder / "m.onnx")
    return onnxruntime.InferenceSession(folder / "m.onnx"), {node.op_type for node in graph}


def encoded(place: PlacedWeight, codes: torch.Tensor, scales: torch.Tensor) -> bytes:
    content = place.storage.encode(scales if place.storage.part == SCALES else codes).numpy().tobytes()
    assert len(content) == place.size_bytes
    return content


def storing_for(parameter: str, form: Form, inputs: int, lowering: str) -> Storing:
    return Storing("fp16", lowering, {parameter: (ROWS, inputs)}, {parameter: form}, {parameter: FLOAT16})


@pytest.mark.parametrize("bits, group, inputs", FORMS)
@pytest.mark.parametrize("lowering, parameter, operator", [
    ("portable", DECODER, "DequantizeLinear"), ("ort", DECODER, "MatMulNBits"), ("ort", TOWER, None),
])  # fmt: skip
def test_the_identity_gives_the_dequantized_weight(
    tmp_path: Path, bits: int, group: int | None, inputs: int, lowering: str, parameter: str, operator: str | None
) -> None:
    storing = storing_for(parameter, Form(bits, group), inputs, lowering)
    numbers = quantized(bits, group, inputs)
    session, operators = session_of(storing, parameter, numbers, None, tmp_path)
    assert (operator or ("MatMulNBits" if bits == 4 else "Cast")) in operators
    wanted = dequantize(*numbers).T.numpy()
    identity = np.eye(inputs, dtype=np.float32)
    assert np.array_equal(session.run(None, {"x": identity})[0], wanted)
    for row in (0, inputs - 1):  # one token takes another kernel
        assert np.array_equal(session.run(None, {"x": identity[row : row + 1]})[0], wanted[row : row + 1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lowering", ["portable", "ort"])
def test_a_bias_is_added_once(tmp_path: Path, bits: int, lowering: str) -> None:
    bias = np.arange(ROWS, dtype=np.float32) - 2.5
    storing = storing_for(DECODER, Form(bits, 32), 64, lowering)
    session, _ = session_of(storing, DECODER, quantized(bits, 32, 64), bias, tmp_path)
    for rows in (1, 3):
        assert np.array_equal(session.run(None, {"x": np.zeros((rows, 64), np.float32)})[0], np.tile(bias, (rows, 1)))


@pytest.mark.parametrize("lowering", ["portable", "ort"])
def test_activations_are_not_rounded(tmp_path: Path, lowering: str) -> None:
    """Eight-bit activations would be off by 5e-3 of the output; float32 ones by a millionth."""
    numbers = quantized(4, 32, 1280)
    session, _ = session_of(storing_for(DECODER, Form(4, 32), 1280, lowering), DECODER, numbers, None, tmp_path)
    x = np.random.default_rng(0).standard_normal((1, 1280)).astype(np.float32)
    wanted = x.astype(np.float64) @ dequantize(*numbers).double().numpy().T
    assert np.abs(session.run(None, {"x": x})[0] - wanted).max() / wanted.std() < 2e-5


def test_blocks_end_where_scales_end() -> None:
    cases = {(32, 1280): 32, (128, 1280): 128, (512, 1024): 256, (16, 4304): 16, (None, 4304): 16, (None, 1280): 256,
             (None, 43): 16, (8, 64): None, (48, 96): 16}  # fmt: skip
    assert {case: block_for(Form(8, case[0]), case[1]) for case in cases} == cases


def test_every_use_has_its_reason() -> None:
    by_head = "language.layers.0.self_attn.kv_b_proj.weight"
    shapes = {name: (64, 64) for name in (DECODER, TOWER, by_head, "language.embed_tokens.weight")}
    forms = dict.fromkeys(shapes, Form(8, None))
    ort = Storing("fp16", "ort", shapes, forms)
    assert [ort.use_of(name) for name in shapes] == [NBITS, MULTIPLY, "floats", DEQUANTIZE]
    assert ort.size_bytes(by_head) == 4 * 64 * 64  # per head, as exact float32
    assert {Storing("fp16", "portable", shapes, forms).use_of(name) for name in shapes} == {DEQUANTIZE}

"""Two ONNX models of one node, written byte by byte: the onnx package is no part of a device's installation.

Field numbers are those of onnx.proto (IR version 8), wire types those of protobuf.
"""

from __future__ import annotations

import struct

_FLOAT, _UINT8, _INT = 1, 2, 2
_SIDE = 32


def matmul_model() -> bytes:
    """y[1, 16] = x[1, 32] · w with w all 2: the sum of x, doubled. Standard operators, as every bundle has."""
    weight = _tensor("w", _FLOAT, (_SIDE, 16), struct.pack("<f", 2.0) * (_SIDE * 16))
    return _model(_node("MatMul", ("x", "w")), weight)


def nbits_model() -> bytes:
    """The same of int4 codes 1 with the scale 2, by MatMulNBits, as int4 and int8 bundles of lowering `ort` have."""
    codes = _tensor("codes", _UINT8, (16, 1, _SIDE // 2), bytes([0x99]) * (16 * _SIDE // 2))  # 9 − 8
    scales = _tensor("scales", _FLOAT, (16,), struct.pack("<f", 2.0) * 16)
    attributes = b"".join(_attribute(name, value)
                          for name, value in (("K", _SIDE), ("N", 16), ("bits", 4), ("block_size", _SIDE)))
    return _model(_node("MatMulNBits", ("x", "codes", "scales"), attributes, "com.microsoft"), codes + scales)


def _model(node: bytes, initializers: bytes) -> bytes:
    graph = (_field(1, node) + _text(2, "probe") + initializers + _field(11, _port("x", (1, _SIDE)))
             + _field(12, _port("y", (1, 16))))
    opsets = _field(8, _text(1, "") + _number(2, 17)) + _field(8, _text(1, "com.microsoft") + _number(2, 1))
    return _number(1, 8) + opsets + _field(7, graph)


def _node(kind: str, inputs: tuple[str, ...], attributes: bytes = b"", domain: str = "") -> bytes:
    names = b"".join(_text(1, name) for name in inputs)
    return names + _text(2, "y") + _text(4, kind) + attributes + _text(7, domain)


def _attribute(name: str, value: int) -> bytes:
    return _field(5, _text(1, name) + _number(3, value) + _number(20, _INT))


def _tensor(name: str, kind: int, shape: tuple[int, ...], data: bytes) -> bytes:
    sides = b"".join(_number(1, side) for side in shape)
    return _field(5, sides + _number(2, kind) + _text(8, name) + _field(9, data))


def _port(name: str, shape: tuple[int, ...]) -> bytes:
    sides = b"".join(_field(1, _number(1, side)) for side in shape)
    return _text(1, name) + _field(2, _field(1, _number(1, _FLOAT) + _field(2, sides)))


def _text(number: int, text: str) -> bytes:
    return _field(number, text.encode())


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])

"""What an engine keeps of its plugins are the attributes that the graph gave them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.plugins.tensorrt.test_operators import EXPERTS
from vl2.plugins.tensorrt.build import EngineJob, build_apart
from vl2.plugins.tensorrt.flavour import load_tensorrt

# Experts of as many forms as a layer can have, each attribute another value than its neighbour's.
INPUTS = {
    "x": ("float16", ["tokens", 64]), "logits": ("float32", ["tokens", 8]),
    "gate": ("int8", [8, 32, 32]), "gate_scale": ("float16", [8, 32, 2]),
    "up": ("int8", [8, 32, 32]), "up_scale": ("float16", [8, 32, 2]),
    "down": ("int8", [8, 64, 32]), "down_scale": ("float16", [8, 64, 1]), "correction_bias": ("float32", [8]),
    "shared_gate": ("float16", [64, 64]), "shared_up": ("float16", [64, 64]),
    "shared_down": ("int8", [64, 64]), "shared_down_scale": ("float16", [64, 1]),
}  # fmt: skip
TOKENS = ({"x": ((1, 64), (4, 64), (512, 64)), "logits": ((1, 8), (4, 8), (512, 8))},)


def begin_of(first: str) -> bytes:
    """How the fields of a plugin begin in an engine, by the name of the first."""
    return struct.pack("<I", len(first) + 1) + first.encode() + b"\0"


def serialized_fields(engine: bytes, place: int, count: int, kinds: dict[str, int]) -> dict[str, object]:
    """The fields of one plugin in an engine of TensorRT-RTX 1.7: length and name, type, length and value of each.

    place: where they begin; kinds: TensorRT's numbers of the types `str`, `int` and `float`.
    """
    found = {}
    while len(found) < count and 1 < (size := struct.unpack_from("<I", engine, place)[0]) < 40:
        name = engine[place + 4:place + 4 + size].rstrip(b"\0").decode(errors="replace")
        kind, length = struct.unpack_from("<II", engine, place + 4 + size)
        place += 12 + size
        if kind == kinds["str"]:
            found[name] = engine[place:place + length].rstrip(b"\0").decode(errors="replace")
            place += length
        else:
            found[name] = struct.unpack_from("<f" if kind == kinds["float"] else "<i", engine, place)[0]
            place += 4
    return found


def kinds_of(rtx: str) -> dict[str, int]:
    """For `serialized_fields`."""
    types = load_tensorrt(rtx).PluginFieldType
    return {"str": int(types.CHAR), "int": int(types.INT32), "float": int(types.FLOAT32)}


def test_the_attributes_in_a_built_engine_are_those_of_the_graph(rtx: str, one_node) -> None:
    """TensorRT reads the fields after `get_fields_to_serialize` has returned."""
    path = one_node("Experts", EXPERTS, INPUTS)
    build_apart(EngineJob(path, f"{path}.engine", rtx, ("8.9",), TOKENS))
    engine = Path(f"{path}.engine").read_bytes()
    found = serialized_fields(engine, engine.index(begin_of(next(iter(EXPERTS)))), len(EXPERTS), kinds_of(rtx))
    assert found == {**EXPERTS, "routed_scaling_factor": pytest.approx(EXPERTS["routed_scaling_factor"])}

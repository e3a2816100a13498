"""The C++ host, compiled against abi/NvInfer.h, host_driver.cpp in TensorRT's place and fake_libcuda.c in CUDA's."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vl2.plugins.cuda.launch import Plan, workspace_bytes
from vl2.plugins.tensorrt.host import compile_host
from vl2.plugins.tensorrt.operators import OPERATORS

FOLDER = Path(__file__).parent
ABI = FOLDER / "abi"
TYPES = {"float32": 0, "float16": 1, "int8": 2, "int64": 8}
FLOAT32, INT32, CHAR = 1, 5, 6
STREAM = 7
_LAUNCHED = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_int,
                             ctypes.c_void_p, ctypes.c_void_p)  # fmt: skip


class Field(ctypes.Structure):
    """nvinfer1::PluginField."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("kind", ctypes.c_int32),
                ("length", ctypes.c_int32)]  # fmt: skip


def compile_test_host(folder: Path, arch: str = "sm_86") -> Path:
    """The library with a text in the place of kernels."""
    image = folder / "image"
    image.write_bytes(f"kernels of {arch}".encode() + b"\0")
    library = folder / f"libvl2_plugins_{arch}.so"
    compile_host(library, {arch: image}, ABI)
    return library


class PlayedHost:
    """Plugins of one host library. launch: called with each kernel's name, sizes, allowed bytes, and parameters."""

    def __init__(self, folder: Path):
        self.cuda = ctypes.CDLL(self._compiled("gcc", folder, "fake_libcuda.c", "libcuda.so.1"), ctypes.RTLD_GLOBAL)
        self.driver = ctypes.CDLL(self._compiled("g++", folder, "host_driver.cpp", "driver.so"))
        for name in ("open_host", "attached_plugin"):
            getattr(self.driver, name).restype = ctypes.c_void_p
        self.library = self.driver.open_host(str(compile_test_host(folder)).encode())
        self.host = ctypes.CDLL(str(folder / "libvl2_plugins_sm_86.so"))

    @staticmethod
    def _compiled(compiler: str, folder: Path, source: str, name: str) -> str:
        out = folder / name
        subprocess.run([compiler, "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-I", str(ABI), "-o", str(out),
                        str(FOLDER / source), "-ldl"], check=True)  # fmt: skip
        return str(out)

    def on_launch(self, called: Callable) -> None:
        """Sets what a launch does; it gives CUDA's status."""
        self._called = _LAUNCHED(called)  # kept: the library has a pointer to it
        ctypes.c_void_p.in_dll(self.cuda, "launched").value = ctypes.cast(self._called, ctypes.c_void_p).value

    def plugin(self, operator: str, attributes: dict) -> int | None:
        """Address of a plugin as an execution context has it; None where the host refuses."""
        fields, self._held = (Field * len(attributes))(), []
        for field, (name, value) in zip(fields, attributes.items(), strict=True):
            words = value.encode() if isinstance(value, str) else None
            kind = CHAR if words is not None else FLOAT32 if isinstance(value, float) else INT32
            array = np.frombuffer(words or b"\0", np.int8) if kind == CHAR else np.array(
                [value], np.float32 if kind == FLOAT32 else np.int32)  # fmt: skip
            self._held.append(array)
            field.name, field.data, field.kind, field.length = name.encode(), array.ctypes.data, kind, array.size
        return self.driver.attached_plugin(ctypes.c_void_p(self.library), operator.encode(), fields, len(fields))

    def serialized(self, plugin: int) -> list[tuple[str, object]]:
        """Name and value of each field."""
        first = ctypes.POINTER(Field)()
        count = self.driver.fields_of(ctypes.c_void_p(plugin), ctypes.byref(first))
        types = {FLOAT32: np.float32, INT32: np.int32}
        return [(one.name.decode(), ctypes.string_at(one.data, one.length).rstrip(b"\0").decode() if one.kind == CHAR
                 else types[one.kind](np.frombuffer(ctypes.string_at(one.data, 4), types[one.kind])[0]).item())
                for one in first[:count]]  # fmt: skip

    def enqueue(self, plugin: int, operator: str, attributes: dict, arrays: dict[str, np.ndarray]) -> int:
        """Runs it on arrays, outputs included by their names; an aliased output is its input."""
        made = OPERATORS[operator]
        inputs = [arrays[tensor.name] for tensor in made.inputs(attributes)]
        outputs = [arrays[made.aliased.get(tensor.name, tensor.name)] for tensor in made.outputs]
        sides = np.zeros((len(inputs), 9), np.int64)
        for row, array in zip(sides, inputs, strict=True):
            row[0], row[1:1 + array.ndim] = array.ndim, array.shape
        shapes = {tensor.name: array.shape for tensor, array in zip(made.inputs(attributes), inputs, strict=True)}
        self.workspace = np.full(max(1, workspace_bytes(made.plan(attributes, shapes))), 255, np.uint8)
        pointers = [(ctypes.c_void_p * len(each))(*(array.ctypes.data for array in each)) for each in (inputs, outputs)]
        return self.driver.enqueue(ctypes.c_void_p(plugin), sides.ctypes.data_as(ctypes.c_void_p), pointers[0],
                                   len(inputs), pointers[1],
                                   self.workspace.ctypes.data_as(ctypes.c_void_p))  # fmt: skip


def read_parameters(launch, parameters: int) -> tuple:
    """Values of a kernel's parameters as Python's plan has their types."""
    pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
    kinds = [ctypes.c_float if isinstance(each, float) else ctypes.c_int if isinstance(each, int) else ctypes.c_void_p
             for each in launch.arguments]  # fmt: skip
    return tuple(ctypes.cast(pointers[place], ctypes.POINTER(kind))[0] for place, kind in enumerate(kinds))


def expected_launches(plan: Plan) -> list[tuple]:
    """As `PlayedHost.on_launch` is told of them."""
    return [(one.kernel, (*one.grid, *one.block, one.shared_bytes)) for one in plan.launches]

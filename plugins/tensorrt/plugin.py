"""The operators as IPluginV3 in Python, for TensorRT 10.3 and later and TensorRT-RTX 1.7: one class for all of them.

Only names that all these versions have (`tests/plugins/tensorrt/test_api.py` checks it).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vl2.errors import VL2Error
from vl2.plugins.cuda.launch import workspace_bytes
from vl2.plugins.tensorrt.launcher import current_launcher
from vl2.plugins.tensorrt.operators import NAMESPACE, OPERATORS, VERSION, Operator

# Smallest and largest shape of an input. (The `opt` of a range is not always filled in.)
Bounds = tuple[tuple[int, ...], tuple[int, ...]]
_DTYPES = {"float32": "FLOAT", "float16": "HALF", "int8": "INT8", "int64": "INT64"}


def register_plugins(trt: Any, errors: list[VL2Error]) -> None:
    """Registers a creator of each operator. trt: `tensorrt` or `tensorrt_rtx`; errors: gets what plugins refuse, as
    TensorRT's own messages keep no more than that something was refused."""
    registry = trt.get_plugin_registry()
    for operator in OPERATORS.values():
        if registry.get_creator(operator.name, VERSION, NAMESPACE) is None:
            creator = creator_class(trt)(operator, errors)
            _ALIVE.append(creator)
            if not registry.register_creator(creator, NAMESPACE):
                raise VL2Error(f"TensorRT {trt.__version__} does not take the plugin vl2::{operator.name}",
                               "another library has registered one of this name")  # fmt: skip


def load_plugins(trt: Any, library: str) -> None:
    """Takes the C++ host's creators in the place of these. Raises VL2Error where TensorRT does not load the file."""
    if not Path(library).is_file() or trt.get_plugin_registry().load_library(library) is None:
        raise VL2Error(f"TensorRT {trt.__version__} does not load the plugins of {library}",
                       "make it again: python -m vl2.plugins.tensorrt.host")  # fmt: skip


def told_by(library: str) -> list[VL2Error]:
    """What the C++ host's plugins refused first, where they have refused anything."""
    said = ctypes.CDLL(library).vl2_plugin_error
    said.restype = ctypes.c_char_p
    message, _, hint = said().decode().partition("\n")
    return [VL2Error(message, hint or None)] if message else []


# The registry holds no reference of its own.
_ALIVE: list[Any] = []


@cache
def plugin_class(trt: Any) -> type:
    """The plugin over this TensorRT's base classes, which exist only once it is imported."""
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime)
    return type("Plugin", (_Plugin, *bases), {"trt": trt, "bases": bases})


class _Plugin:
    """What IPluginV3 asks for. trt, bases: of the class that `plugin_class` makes."""

    trt: Any
    bases: tuple[type, ...]

    def __init__(self, operator: Operator, attributes: dict[str, Any], errors: list[VL2Error]):
        for base in self.bases:
            base.__init__(self)
        self.plugin_name, self.plugin_namespace, self.plugin_version = operator.name, NAMESPACE, VERSION
        self.num_outputs = len(operator.outputs)
        self._operator, self._attributes, self._errors = operator, attributes, errors
        self._names = [tensor.name for tensor in operator.inputs(attributes)]
        self._tensors = [*operator.inputs(attributes), *operator.outputs]
        self._plans: dict[tuple, Any] = {}
        # a collection has C structs with pointers into these, and TensorRT reads it when Python has let go of it
        self._fields = [_field(self.trt, *item) for item in attributes.items()]

    def get_capability_interface(self, kind: Any) -> Any:
        return self

    def clone(self) -> Any:
        copy = type(self)(self._operator, self._attributes, self._errors)
        copy.__dict__.update(self.__dict__)
        return copy

    def get_output_data_types(self, input_types: list) -> list:
        names = {_dtype(self.trt, name): name for name in _DTYPES}
        with _Kept(self._errors):
            self._operator.check_types(self._attributes, [names.get(each, str(each)) for each in input_types])
        return [_dtype(self.trt, tensor.dtype) for tensor in self._operator.outputs]

    def get_output_shapes(self, inputs: list, shape_inputs: list, exprs: Any) -> list:
        shapes = []
        for tensor in self._operator.outputs:
            sides = self.trt.DimsExprs(inputs[self._names.index(tensor.like)])
            if tensor.last is not None:
                sides[len(sides) - 1] = exprs.constant(self._attributes[tensor.last])
            shapes.append(sides)
        return shapes

    def get_aliased_input(self, output: int) -> int:
        source = self._operator.aliased.get(self._operator.outputs[output].name)
        return -1 if source is None else self._names.index(source)

    def supports_format_combination(self, position: int, described: list, inputs: int) -> bool:
        one, dtype = described[position].desc, _dtype(self.trt, self._tensors[position].dtype)
        return one.format == self.trt.TensorFormat.LINEAR and one.type == dtype

    def configure_plugin(self, inputs: list, outputs: list) -> None:
        """Nothing is chosen here; an exception here would damage TensorRT-RTX's memory."""

    def get_workspace_size(self, inputs: list, outputs: list) -> int:
        # what is refused here is kept and ends the build behind TensorRT
        with _Kept(self._errors, hidden=True):
            ranges = tuple((tuple(one.min), tuple(one.max)) for one in inputs)
            return largest_workspace(self._operator.name, tuple(self._attributes.items()), ranges)
        return 0

    def on_shape_change(self, inputs: list, outputs: list) -> None:
        """Shapes are looked at in `enqueue`."""

    def attach_to_context(self, context: Any) -> Any:
        return self.clone()

    def get_fields_to_serialize(self) -> Any:
        return self.trt.PluginFieldCollection(self._fields)

    def set_tactic(self, tactic: int) -> None:
        """There is one."""

    def enqueue(  # noqa: PLR0913  (TensorRT's signature)
        self, input_desc: list, output_desc: list, inputs: list, outputs: list, workspace: int, stream: int
    ) -> None:
        names = [tensor.name for tensor in self._tensors]
        with _Kept(self._errors):
            plan = self._plan(tuple(tuple(one.dims) for one in input_desc))
            current_launcher().run(plan, dict(zip(names, (*inputs, *outputs), strict=True)), workspace, stream)

    def _plan(self, sides: tuple[tuple[int, ...], ...]) -> Any:
        if sides not in self._plans:
            self._plans[sides] = self._operator.plan(self._attributes, dict(zip(self._names, sides, strict=True)))
        return self._plans[sides]


@lru_cache(maxsize=256)
def largest_workspace(operator: str, attributes: tuple[tuple[str, Any], ...], ranges: tuple[Bounds, ...]) -> int:
    """Bytes that suffice for every plan within the ranges of a node's inputs. Raises VL2Error where one has none.

    Remembered: the layers of a decoder are alike, and TensorRT asks for each of them more than once.
    """
    given, made = dict(attributes), OPERATORS[operator]
    names = [tensor.name for tensor in made.inputs(given)]
    return max(workspace_bytes(made.plan(given, dict(zip(names, sides, strict=True))))
               for sides in shapes_between(names, ranges))  # fmt: skip


def shapes_between(names: list[str], ranges: Sequence[Bounds]) -> set[tuple[tuple[int, ...], ...]]:
    """Shapes of the inputs for every number of tokens, each with whole caches: plans change from one number to another,
    and the largest need not need most; a longer cache never needs less (vl2.plugins.cuda.attention.Sizes)."""
    dynamic = [bounds for name, (low, high) in zip(names, ranges, strict=True) if not name.endswith("cache")
               for bounds in zip(low, high, strict=True) if bounds[0] != bounds[1]]  # fmt: skip
    least, most = (min(low for low, _ in dynamic), max(high for _, high in dynamic)) if dynamic else (1, 1)

    def shape(name: str, low: tuple[int, ...], high: tuple[int, ...], count: int) -> tuple[int, ...]:
        whole = name.endswith("cache")
        return tuple(end if whole else min(end, max(start, count)) for start, end in zip(low, high, strict=True))

    return {tuple(shape(name, *bounds, count) for name, bounds in zip(names, ranges, strict=True))
            for count in range(max(1, least), most + 1)}  # fmt: skip


@cache
def creator_class(trt: Any) -> type:
    """The creator over this TensorRT's base class."""
    return type("Creator", (_Creator, trt.IPluginCreatorV3One), {"trt": trt, "base": trt.IPluginCreatorV3One})


class _Creator:
    """What IPluginCreatorV3One asks for. trt, base: of the class that `creator_class` makes."""

    trt: Any
    base: type

    def __init__(self, operator: Operator, errors: list[VL2Error]):
        self.base.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = operator.name, NAMESPACE, VERSION
        empty = {int: 0, float: 0.0, str: ""}
        # kept for the pointers into them, as a plugin's are
        self._fields = [_field(self.trt, name, empty[kind]) for name, kind in operator.attributes.items()]
        self.field_names = self.trt.PluginFieldCollection(self._fields)
        self._operator, self._errors = operator, errors

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
        given = {field.name: _value(self.trt, field) for field in fields}
        with _Kept(self._errors):
            self._operator.check_attributes(given)
            attributes = {name: given[name] for name in self._operator.attributes}
            return plugin_class(self.trt)(self._operator, attributes, self._errors)


class _Kept:
    """Keeps the VL2Error that leaves the block; hidden: which then goes on behind it."""

    def __init__(self, errors: list[VL2Error], hidden: bool = False):
        self._errors, self._hidden = errors, hidden

    def __enter__(self) -> None:
        """Nothing to begin."""

    def __exit__(self, kind: Any, error: Any, _: Any) -> bool:
        if isinstance(error, VL2Error):
            self._errors.append(error)
        return self._hidden and isinstance(error, VL2Error)


def _dtype(trt: Any, name: str) -> Any:
    return getattr(trt.DataType, _DTYPES[name])


def _field(trt: Any, name: str, value: Any) -> Any:
    kinds = trt.PluginFieldType
    if isinstance(value, str):
        return trt.PluginField(name, np.frombuffer(value.encode() or b"\0", np.int8), kinds.CHAR)
    if isinstance(value, float):
        return trt.PluginField(name, np.array([value], np.float32), kinds.FLOAT32)
    return trt.PluginField(name, np.array([value], np.int32), kinds.INT32)


def _value(trt: Any, field: Any) -> Any:
    data = np.asarray(field.data)
    if field.type == trt.PluginFieldType.CHAR:
        return data.tobytes().rstrip(b"\0").decode()
    value = data.reshape(-1)[0].item()
    return float(value) if field.type in (trt.PluginFieldType.FLOAT32, trt.PluginFieldType.FLOAT64) else int(value)

"""JSON read strictly: a missing, unknown or mistyped key is an error that names it."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from vl2.errors import VL2Error

T = TypeVar("T")


def read_json(path: Path) -> dict:
    """The JSON object in `path`; VL2Error naming the file when it is missing, broken or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except FileNotFoundError as error:
        raise VL2Error(f"{path} is missing", "check that the folder is complete") from error
    except (OSError, ValueError, RecursionError) as error:
        raise VL2Error(f"{path} cannot be read as JSON: {error}", "fetch or make the file again") from error
    if not isinstance(content, dict):
        raise VL2Error(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(…, object_pairs_hook=unique_keys)`: ValueError naming a key that an object has twice."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} occurs twice")
        values[key] = value
    return values


def from_json(expected: type[T], value: Any, where: str) -> T:
    """`value` as `expected`: a frozen dataclass, tuple, dict, union or plain type, checked to the leaves.

    Raises VL2Error naming the place, such as `manifest.json: graphs.vision.file`, and what was expected there.
    """
    if dataclasses.is_dataclass(expected):
        return _dataclass_from_json(expected, value, where)
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if origin is tuple and isinstance(value, list):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) == len(value):
            return tuple(from_json(kind, item, f"{where}[{index}]")
                         for index, (kind, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: from_json(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin in (typing.Union, types.UnionType) and type(value) in arguments:
        return value
    if type(value) is expected:
        return value
    if type(value) is int and (expected is float or float in arguments):
        return float(value)
    raise VL2Error(f"{where} is {_shortened(value)}, expected {getattr(expected, '__name__', expected)}")


def to_json(value: Any) -> Any:
    """The inverse of `from_json`: dataclasses as dicts, tuples as lists."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def _dataclass_from_json(expected: type[T], value: Any, where: str) -> T:
    if not isinstance(value, dict):
        raise VL2Error(f"{where} is {_shortened(value)}, expected an object")
    fields = {field.name: field for field in dataclasses.fields(expected)}
    required = [name for name, field in fields.items()
                if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING]
    for name in required:
        if name not in value:
            raise VL2Error(f"{where} has no {name!r}", "the file is incomplete or was made by another program")
    hints = typing.get_type_hints(expected)
    for name in value:
        if name not in fields:
            raise VL2Error(f"{where} has an unknown key {name!r}", f"expected are {', '.join(fields)}")
    return expected(**{name: from_json(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

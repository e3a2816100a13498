"""`quantization_config` of config.json: which matrices lie packed in the files, and how many bits and scales they have.

What is read is compressed-tensors' `pack-quantized` with symmetric integers, weights only; everything else is refused
by name. A quantized module X has `X.weight_packed`, `X.weight_scale` and `X.weight_shape` in place of `X.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vl2.errors import VL2Error

FORMAT = "pack-quantized"
# Beside config.json: recipe, method, calibration data, what each matrix lost.
DESCRIPTION_NAME = "quantization.json"
WEIGHT, PACKED, SCALE, SHAPE = ".weight", ".weight_packed", ".weight_scale", ".weight_shape"
# compressed-tensors' target that names a class, of which the embedding table is none.
_LINEAR = "Linear"
_EMBEDDINGS = "embed_tokens"

_ANYTHING = None
# Keys of the object to the values that are read; `_ANYTHING`: says how the file was made, or is read below.
_OBJECT: dict[str, tuple[Any, ...] | None] = {
    "quant_method": ("compressed-tensors",), "format": (FORMAT,), "quantization_status": ("compressed",),
    "kv_cache_scheme": (None,), "sparsity_config": (None, {}), "transform_config": (None, {}),
    "version": _ANYTHING, "config_groups": _ANYTHING, "ignore": _ANYTHING, "global_compression_ratio": _ANYTHING,
}  # fmt: skip
_GROUP: dict[str, tuple[Any, ...] | None] = {
    "input_activations": (None,), "output_activations": (None,), "format": (None, FORMAT),
    "targets": _ANYTHING, "weights": _ANYTHING,
}  # fmt: skip
_WEIGHTS: dict[str, tuple[Any, ...] | None] = {
    "num_bits": (4, 8), "type": ("int",), "symmetric": (True,), "dynamic": (False,), "strategy": ("group", "channel"),
    "actorder": (None, False, "static", "weight"), "block_structure": (None,),
    "group_size": _ANYTHING, "observer": _ANYTHING, "observer_kwargs": _ANYTHING, "scale_dtype": _ANYTHING,
    "zp_dtype": _ANYTHING,
}  # fmt: skip
_REQUIRED = ("quant_method", "format", "num_bits", "type", "symmetric", "strategy")


@dataclass(frozen=True)
class Form:
    """How a matrix lies in the file: bits, and columns a scale (None: one scale a row)."""

    bits: int
    group_size: int | None

    def scale_columns(self, inputs: int) -> int:
        """Scales of a row of `inputs` codes."""
        return 1 if self.group_size is None else inputs // self.group_size

    def word_columns(self, inputs: int) -> int:
        """int32 words of a row of `inputs` codes."""
        return -(-inputs * self.bits // 32)

    def describe(self) -> str:
        """Such as `int4 g32`, or `int8` with one scale a row."""
        return f"int{self.bits}" if self.group_size is None else f"int{self.bits} g{self.group_size}"


@dataclass(frozen=True)
class QuantizationConfig:
    """Groups of targets with their form; `ignore` goes before them, the most specific target that matches decides."""

    groups: tuple[tuple[tuple[str, ...], Form], ...]
    ignore: tuple[str, ...] = ()

    @staticmethod
    def from_dict(values: Any) -> QuantizationConfig:
        """Raises VL2Error naming the first key that is unknown or asks for what is not read."""
        name = "quantization_config"
        _check_section(name, values, _OBJECT)
        groups = values.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise VL2Error(f"`{name}.config_groups` is {groups!r}, expected an object with one group or more")
        read = tuple(_group(f"{name}.config_groups.{key}", group) for key, group in groups.items())
        return QuantizationConfig(read, _strings(f"{name}.ignore", values.get("ignore") or []))

    def form_of(self, module: str) -> Form | None:
        """The form of a matrix by its module's name; None for one that lies in the file as floats."""
        if _matches(module, self.ignore):
            return None
        return next((form for target, form in self._by_precedence if _matches(module, (target,))), None)

    @cached_property
    def _by_precedence(self) -> list[tuple[str, Form]]:
        """Targets in compressed-tensors' order (`match_targets`): exact names, patterns by their text, the class.

        The order of groups does not count, but for a target that several have: the last one's form is taken.
        """
        forms = {target: form for targets, form in self.groups for target in targets}
        return sorted(forms.items(), key=lambda pair: (pair[0] == _LINEAR, pair[0].startswith("re:"), pair[0]))


def _group(name: str, values: Any) -> tuple[tuple[str, ...], Form]:
    _check_section(name, values, _GROUP)
    weights = values.get("weights")
    _check_section(f"{name}.weights", weights, _WEIGHTS)
    size = weights.get("group_size") if weights["strategy"] == "group" else None
    if weights["strategy"] == "group" and (type(size) is not int or size < 1):
        raise VL2Error(f"`{name}.weights.group_size` is {size!r}, expected a number of columns")
    return _strings(f"{name}.targets", values.get("targets")), Form(weights["num_bits"], size)


def _check_section(name: str, values: Any, known: Mapping[str, tuple[Any, ...] | None]) -> None:
    if not isinstance(values, dict):
        raise VL2Error(f"`{name}` is {values!r}, expected an object")
    for key in [*(key for key in _REQUIRED if key in known), *values]:
        if key not in known:
            raise VL2Error(f"config.json has the unknown key `{name}.{key}` (value {values[key]!r})")
        choices, value = known[key], values.get(key)
        if choices is not _ANYTHING and not any(value == c and type(value) is type(c) for c in choices):
            expected = " or ".join(map(repr, choices))
            raise VL2Error(f"`{name}.{key}` is {value!r}, which is not read; expected {expected}")


def _strings(name: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise VL2Error(f"`{name}` is {values!r}, expected a list of module names")
    for pattern in (value[3:] for value in values if value.startswith("re:")):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise VL2Error(f"`{name}` has the pattern {pattern!r}, which is no regular expression: {error}") from error
    return tuple(values)


def _matches(module: str, targets: Iterable[str]) -> bool:
    return any(
        re.match(target[3:], module) is not None
        if target.startswith("re:")
        else target == module or (target == _LINEAR and not module.endswith(_EMBEDDINGS))
        for target in targets
    )

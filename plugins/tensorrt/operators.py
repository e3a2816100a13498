"""The four operators as TensorRT sees them: attributes, inputs, outputs, and the launch plan for given shapes.

Names of inputs and outputs are those of the plan's buffers. No TensorRT, no CUDA, no torch here: README.md has the same
as a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vl2.errors import VL2Error
from vl2.plugins.cuda.attention import AttentionProblem, attention_plan
from vl2.plugins.cuda.experts import ExpertsProblem, experts_plan
from vl2.plugins.cuda.latent import LatentProblem, latent_plan
from vl2.plugins.cuda.launch import Plan
from vl2.plugins.cuda.linear import LinearProblem, linear_plan
from vl2.plugins.cuda.routing import RoutingProblem
from vl2.plugins.cuda.storage import Storage

NAMESPACE, VERSION = "vl2", "1"

Attributes = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tensor:
    """One input or output; like: the input whose shape an output has, last: the attribute with its last side."""

    name: str
    dtype: str = "float16"
    like: str | None = None
    last: str | None = None


@dataclass(frozen=True)
class Operator:
    """attributes: by name, their types; aliased: outputs that are inputs written in place, output to input."""

    name: str
    attributes: Mapping[str, type]
    inputs: Callable[[Attributes], tuple[Tensor, ...]]
    outputs: tuple[Tensor, ...]
    plan: Callable[[Attributes, Shapes], Plan]
    aliased: Mapping[str, str]

    def check_types(self, attributes: Attributes, dtypes: list[str]) -> None:
        """Raises VL2Error unless a node has these inputs."""
        expected = self.inputs(attributes)
        if len(dtypes) != len(expected):
            raise VL2Error(f"vl2::{self.name} got {len(dtypes)} inputs, expected {len(expected)}: "
                           f"{', '.join(tensor.name for tensor in expected)}", _REMEDY)
        for number, (tensor, dtype) in enumerate(zip(expected, dtypes, strict=True)):
            if dtype != tensor.dtype:
                raise VL2Error(f"input {number} of vl2::{self.name}, `{tensor.name}`, is {dtype}, "
                               f"expected {tensor.dtype}", _REMEDY)

    def check_attributes(self, given: Attributes) -> None:
        """Raises VL2Error on a missing attribute or one of another type."""
        for name, kind in self.attributes.items():
            if name not in given:
                raise VL2Error(f"vl2::{self.name} has no attribute `{name}`", _REMEDY)
            if not isinstance(given[name], kind):
                raise VL2Error(f"`{name}` of vl2::{self.name} is {given[name]!r}, expected {kind.__name__}", _REMEDY)


_REMEDY = "export the bundle again with this vl2 and --lowering trt"


def _matrices(names: tuple[str, ...], schemes: tuple[str, ...], given: Attributes) -> Iterator[Tensor]:
    """A float16 matrix is one input, a quantized one codes and scales."""
    for name, scheme in zip(names, schemes, strict=True):
        packed = given[scheme] != "fp16"
        yield Tensor(name, "int8" if packed else "float16")
        if packed:
            yield Tensor(f"{name}_scale")


def _experts_inputs(given: Attributes) -> tuple[Tensor, ...]:
    routed = _matrices(("gate", "up", "down"), ("scheme", "scheme", "down_scheme"), given)
    biased = given["topk_method"] == "noaux_tc"
    bias = (Tensor("correction_bias", "float32"),) if biased else ()
    shared = ()
    if given["shared_size"]:
        schemes = ("shared_scheme", "shared_scheme", "shared_down_scheme")
        shared = _matrices(("shared_gate", "shared_up", "shared_down"), schemes, given)
    return (Tensor("x"), Tensor("logits", "float32"), *routed, *bias, *shared)


def _storage(given: Attributes, prefix: str) -> Storage:
    return Storage(given[f"{prefix}scheme"], given[f"{prefix}group_size"])


_ROUTING = {"experts": int, "top_k": int, "topk_method": str, "scoring_func": str, "n_group": int, "topk_group": int,
            "norm_topk_prob": int, "routed_scaling_factor": float}  # fmt: skip
_SIZES = {"hidden_size": int, "inner_size": int, "shared_size": int}
_PREFIXES = ("", "down_", "shared_", "shared_down_")
_FORMS = {f"{prefix}{key}": kind for prefix in _PREFIXES for key, kind in (("scheme", str), ("group_size", int))}


def _experts_plan(given: Attributes, shapes: Shapes) -> Plan:
    fields = {name: given[name] for name in _ROUTING} | {"norm_topk_prob": bool(given["norm_topk_prob"])}
    routing = RoutingProblem(tokens=shapes["x"][0], **fields)
    sizes = {name: given[name] for name in _SIZES}
    return experts_plan(ExpertsProblem(routing, **sizes, **dict(zip(
        ("gate_up", "down", "shared_gate_up", "shared_down"), (_storage(given, prefix) for prefix in _PREFIXES),
        strict=True))))  # fmt: skip


def _linear_plan(given: Attributes, shapes: Shapes) -> Plan:
    tokens = 1
    for side in shapes["x"][:-1]:
        tokens *= side
    return linear_plan(LinearProblem(tokens, given["N"], given["K"], _storage(given, "")))


def _latent_plan(given: Attributes, shapes: Shapes) -> Plan:
    batch, heads, tokens, rank = shapes["query"]
    _, capacity, width = shapes["cache"]
    return latent_plan(LatentProblem(batch, heads, tokens, rank, width - rank, capacity, given["scale"]))


def _attention_plan(given: Attributes, shapes: Shapes) -> Plan:
    batch, tokens, width = shapes["query"]
    _, capacity, kv_heads, size = shapes["key_cache"]
    return attention_plan(AttentionProblem(batch, width // size, kv_heads, tokens, size, capacity, given["scale"]))


def _fixed(*tensors: Tensor) -> Callable[[Attributes], tuple[Tensor, ...]]:
    return lambda given: tensors


_TABLES = (Tensor("cos", "float32"), Tensor("sin", "float32"))
_PAST = Tensor("past_length", "int64")

OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("Experts", {**_ROUTING, **_SIZES, **_FORMS}, _experts_inputs, (Tensor("y", like="x"),),
                 _experts_plan, {}),
        Operator("Linear", {"N": int, "K": int, "scheme": str, "group_size": int},
                 lambda given: (Tensor("x"), *_matrices(("weight",), ("scheme",), given)),
                 (Tensor("y", like="x", last="N"),), _linear_plan, {}),
        Operator("LatentAttention", {"scale": float},
                 _fixed(Tensor("query"), Tensor("query_rope"), Tensor("latent"), Tensor("key_rope"), *_TABLES,
                        Tensor("cache"), _PAST),
                 (Tensor("y", like="query"), Tensor("written", like="cache")), _latent_plan, {"written": "cache"}),
        Operator("Attention", {"scale": float},
                 _fixed(Tensor("query"), Tensor("key"), Tensor("value"), *_TABLES, Tensor("key_cache"),
                        Tensor("value_cache"), _PAST),
                 (Tensor("y", like="query"), Tensor("written_key", like="key_cache"),
                  Tensor("written_value", like="value_cache")),
                 _attention_plan, {"written_key": "key_cache", "written_value": "value_cache"}),
    )
}  # fmt: skip

"""From PyTorch modules to ONNX nodes, with no weight in memory: the modules live on the meta device.

The traced graph holds standard operators and some of our own, which lowerings replace or keep:
`vl2::Linear(x [..., K], weight [N, K], bias [N]?)` and those that the modules' substitutes leave (`SUBSTITUTES`).
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset
from torch import nn

from vl2.export.passes.fold_constants import fold_constants
from vl2.manifest import Port
from vl2.model.attention import Attention, LatentAttention
from vl2.model.moe import Experts, MoE
from vl2.model.vision import VisionAttention
from vl2.plugins.attention import op as attention_op
from vl2.plugins.attention.op import TracedAttention
from vl2.plugins.experts import moe as moe_op
from vl2.plugins.experts import op as experts_op
from vl2.plugins.latent_attention import op as latent_attention_op
from vl2.plugins.latent_attention.op import TracedLatentAttention
from vl2.plugins.substitution import Substitutes, substitute
from vl2.plugins.vision_attention import op as vision_attention_op
from vl2.plugins.vision_attention.op import TracedVisionAttention

# Newest opset that every ONNX Runtime from 1.20 on and TensorRT from 10.3 on reads.
OPSET = 20
DOMAIN = "vl2"

# What stands in the place of modules while they are traced: for lowerings to standard operators, and for those that
# keep the operators of `plugins/`.
STANDARD: Substitutes = {Experts: experts_op.TracedExperts}
ROUNDING: Substitutes = {Attention: TracedAttention, LatentAttention: TracedLatentAttention}
NATIVE: Substitutes = {MoE: moe_op.TracedMoE, VisionAttention: TracedVisionAttention, **ROUNDING}

# Sizes for tracing: distinct, so that no two sides are taken for one; past and new tokens of 0 and 1 are tested.
_SIZES = {"batch": 2, "tokens": 3, "past": 5, "total": 8, "capacity": 7, "tiles": 2}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8, "int64": torch.int64,
           "bool": torch.bool}  # fmt: skip


def trace(
    module: nn.Module, inputs: tuple[Port, ...], outputs: tuple[Port, ...], substitutes: Substitutes = STANDARD
) -> ir.Model:
    """The ONNX model of a module on the meta device; initializers named as its parameters, without data."""
    substitute(module, substitutes)
    arguments = tuple(_sample(port) for port in inputs)
    with _quiet(), _uninterrupted(), _uncached(), _translations_kept(), _operators_listed_once(), torch.no_grad():
        program = torch.export.export(module.eval(), arguments, dynamic_shapes=_dynamic(module, inputs), strict=False)
        translated = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            custom_translation_table=_TRANSLATIONS,
            input_names=[port.name for port in inputs],
            output_names=[port.name for port in outputs],
        )
    model = translated.model
    _name_sides(model.graph, inputs)
    weights = {name for name, _ in module.named_parameters()}
    for name in weights & model.graph.initializers.keys():
        model.graph.initializers[name].const_value = None
    fold_constants(model, weights)
    return model


def _sample(port: Port) -> torch.Tensor:
    shape = [_SIZES[side] if isinstance(side, str) else side for side in port.shape]
    return torch.empty(shape, dtype=DTYPES[port.dtype], device="meta")


def _dynamic(module: nn.Module, inputs: tuple[Port, ...]) -> tuple:
    """Every named side is free; that total = past + tokens the tracer finds by itself."""
    free = torch.export.Dim.DYNAMIC
    sides = tuple({axis: free for axis, side in enumerate(port.shape) if isinstance(side, str)} for port in inputs)
    parameters = inspect.signature(module.forward).parameters.values()
    fixed = sum(parameter.kind is not inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    # a variadic forward takes the shapes of its rest as one nested tuple
    return sides if fixed == len(parameters) else (*sides[:fixed], sides[fixed:])


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's warnings are about packages and internals that no user can mend; errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Without garbage collection, which walks the millions of objects of a trace again and again: a tenth of it."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _uncached() -> AbstractContextManager:
    """Finding shapes anew takes less than torch's cache of them, by a tenth of a trace, where most are symbolic."""
    settings = torch._dynamo.config
    known = hasattr(settings, "fake_tensor_cache_enabled")
    return settings.patch(fake_tensor_cache_enabled=False) if known else nullcontext()


@contextmanager
def _translations_kept() -> Iterator[None]:
    """torch.onnx describes all its translations, some 550, anew in every export: a third of a small trace."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        ONNXRegistry = object

    def described(plain: classmethod) -> Callable[..., Any]:
        return functools.partial(_described, plain.__get__(None, ONNXRegistry))

    with _replaced(ONNXRegistry, "from_torchlib", described):
        yield


@contextmanager
def _operators_listed_once() -> Iterator[None]:
    """torch.export lists all operators anew for each of 28 namespaces, twice a trace, in which none is added."""
    with _replaced(torch._export.utils, "_materialize_cpp_cia_ops", functools.cache):
        yield


@contextmanager
def _replaced(owner: Any, name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """With replacement(plain) in place of a member of torch; where it has none of the name, exports take longer."""
    plain = vars(owner).get(name)
    if plain is None:
        yield
        return
    setattr(owner, name, replacement(plain))
    try:
        yield
    finally:
        setattr(owner, name, plain)


def _described(describe: Callable[..., Any], **options: int) -> Any:
    """A registry of its own, to which an export adds ours."""
    made = copy.copy(_kept(describe, **options))
    made.functions = {target: list(found) for target, found in made.functions.items()}
    return made


@functools.cache
def _kept(describe: Callable[..., Any], **options: int) -> Any:
    return describe(**options)


_ATTRIBUTES = {int: OpSchema.AttrType.INT, bool: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT,
               str: OpSchema.AttrType.STRING}  # fmt: skip


# Of a cache that an attention writes.
_CACHE, _CACHE_TYPES = "Cache", [f"tensor({dtype})" for dtype in ("float", "float16", "int8")]


def _operator(
    name: str, inputs: dict[str, str], optional: tuple[str, ...] = (), attributes: dict[str, type] | None = None
) -> Op:
    """A node type of our domain; inputs: name to element type, or to `_CACHE`."""
    option = OpSchema.FormalParameterOption
    parameters = [
        OpSchema.FormalParameter(
            name,
            dtype if dtype == _CACHE else f"tensor({dtype})",
            param_option=option.Optional if name in optional else option.Single,
        )
        for name, dtype in inputs.items()
    ]
    outputs = [OpSchema.FormalParameter("y", "tensor(float)")]
    kinds = [OpSchema.Attribute(key, _ATTRIBUTES[kind]) for key, kind in (attributes or {}).items()]
    free = [(_CACHE, _CACHE_TYPES, "")] if _CACHE in inputs.values() else []
    schema = OpSchema(name, DOMAIN, 1, inputs=parameters, outputs=outputs, attributes=kinds, type_constraints=free)
    return Op(Opset(DOMAIN, 1), name, schema)


_LINEAR = _operator("Linear", {"x": "float", "weight": "float", "bias": "float"}, optional=("bias",))
_EXPERTS = _operator(experts_op.OP_TYPE, experts_op.INPUTS)
_MOE = _operator(moe_op.OP_TYPE, moe_op.INPUTS, moe_op.OPTIONAL, moe_op.RULE)
_VISION_ATTENTION = _operator(vision_attention_op.OP_TYPE, {"qkv": "float"}, (), {"heads": int, "scale": float})


def _attention_operator(op_type: str, inputs: tuple[str, ...]) -> Op:
    """One that writes caches: all inputs float but for these and the length, which are known by their names."""
    types = {name: "int64" if name in ("past_length", "cache_row") else _CACHE if name.endswith("cache") else "float"
             for name in inputs}  # fmt: skip
    optional = tuple(name for name in inputs if name.endswith("_scale") or name == "cache_row")
    return _operator(op_type, types, optional, {"scale": float})


_ATTENTIONS = {op.OP_TYPE: _attention_operator(op.OP_TYPE, op.INPUTS) for op in (attention_op, latent_attention_op)}


def _attention(inputs, op_type, scale):
    return _ATTENTIONS[op_type](*inputs, scale=scale)


def _vision_attention(qkv, heads, scale):
    return _VISION_ATTENTION(qkv, heads=heads, scale=scale)


def _linear(x, weight, bias=None):
    return _LINEAR(x, weight) if bias is None else _LINEAR(x, weight, bias)


def _experts(*inputs):
    return _EXPERTS(*inputs)


def _moe(*arguments):
    count = len(moe_op.INPUTS)
    fields = {name: int(value) if kind is bool else value
              for (name, kind), value in zip(moe_op.RULE.items(), arguments[count:], strict=True)}  # fmt: skip
    return _MOE(*arguments[:count], **fields)


_TRANSLATIONS = {
    torch.ops.aten.linear.default: _linear,
    torch.ops.vl2.experts.default: _experts,
    torch.ops.vl2.moe.default: _moe,
    torch.ops.vl2.attention_node.default: _attention,
    torch.ops.vl2.vision_attention.default: _vision_attention,
}


def _name_sides(graph: ir.Graph, inputs: tuple[Port, ...]) -> None:
    """Gives the tracer's symbols (s10, s1 + s29) the names of the ports, everywhere in the graph."""
    names: dict[str, str] = {}
    for value, port in zip(graph.inputs, inputs, strict=True):
        for found, side in zip(value.shape, port.shape, strict=True):
            if isinstance(side, str):
                names[str(found.value)] = side
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(side, names) for side in value.shape])


def _renamed(side: int | ir.SymbolicDim, names: dict[str, str]) -> int | ir.SymbolicDim:
    # other expressions (such as batch·tokens) stay nameless: a reader gains nothing from the tracer's symbols
    return side if isinstance(side, int) else ir.SymbolicDim(names.get(str(side.value)))

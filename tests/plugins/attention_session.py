"""Sessions of one attention node, its random inputs, and runs beside the eager reference, for tests."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from vl2.operators import library_path
from vl2.plugins.attention import op as plain
from vl2.plugins.latent_attention import op as latent

LIBRARY, REASON = library_path()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=str(REASON))
DTYPES = (torch.float32, torch.float16, torch.int8)
_ONNX = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.int8: TensorProto.INT8,
         torch.int64: TensorProto.INT64}
_FATAL = 4


@dataclass(frozen=True)
class Sizes:
    """batch B, new tokens T, past lengths of each batch entry, heads; then head size D or latent and rope sizes."""

    tokens: int
    past: tuple[int, ...]
    heads: int
    kv_heads: int = 1
    size: int = 0
    rank: int = 0
    rope: int = 0

    @property
    def batch(self) -> int:
        return len(self.past)

    @property
    def capacity(self) -> int:
        return max(self.past) + self.tokens + 3


@dataclass
class Arguments:
    """Inputs of one call by name, in the order of the signature, and the softmax scale."""

    module: object
    tensors: dict[str, Tensor | None]
    scale: float

    def copy(self) -> Arguments:
        copied = {name: None if tensor is None else tensor.clone() for name, tensor in self.tensors.items()}
        return Arguments(self.module, copied, self.scale)

    def changed(self, **tensors: Tensor | None) -> Arguments:
        return Arguments(self.module, self.copy().tensors | tensors, self.scale)

    @property
    def caches(self) -> dict[str, Tensor]:
        """What a call writes."""
        return {name: tensor for name, tensor in self.tensors.items()
                if tensor is not None and name.endswith(("cache", "_scale"))}


def angles(sizes: Sizes, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, width] of the positions behind the past."""
    positions = torch.tensor(sizes.past)[:, None] + torch.arange(sizes.tokens)
    inverse = 10000 ** -(torch.arange(0, width, 2) / width)
    turned = (positions[..., None] * inverse).repeat(1, 1, 2)
    return turned.cos(), turned.sin()


def filled(shape: tuple[int, ...], dtype: torch.dtype, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """A cache with random rows below the past and rows that must not be read above: NaN, or 127."""
    if dtype == torch.int8:
        cache = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    else:
        cache = torch.randn(shape, generator=generator).to(dtype)
    for b, past in enumerate(sizes.past):
        cache[b, past:] = 127 if dtype == torch.int8 else torch.nan
    return cache


def scales(shape: tuple[int, ...], dtype: torch.dtype, sizes: Sizes, generator: torch.Generator) -> Tensor | None:
    """Scales that bring random codes to about the size of normal numbers; None for floats."""
    if dtype != torch.int8:
        return None
    drawn = (torch.rand(shape, generator=generator) + 0.5) / 64
    for b, past in enumerate(sizes.past):
        drawn[b, past:] = torch.nan
    return drawn


def arguments(sizes: Sizes, dtype: torch.dtype = torch.float32, seed: int = 0) -> Arguments:
    """Random inputs; of latent attention where `sizes` has a rank."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, heads = sizes.batch, sizes.tokens, sizes.heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def cache(*entry: int) -> Tensor:
        return filled((batch, sizes.capacity, *entry), dtype, sizes, generator)

    def scale(entries: int) -> Tensor | None:
        return scales((batch, sizes.capacity, entries), dtype, sizes, generator)

    past = torch.tensor(sizes.past[0]) if batch == 1 else torch.tensor(sizes.past)
    if sizes.rank:
        rows = (draw(batch, heads, tokens, sizes.rank), draw(batch, tokens, heads, sizes.rope),
                draw(batch, tokens, sizes.rank), draw(batch, tokens, sizes.rope))
        tensors = (*rows, *angles(sizes, sizes.rope), cache(sizes.rank + sizes.rope), past, scale(2), None)
        return Arguments(latent, dict(zip(latent.INPUTS, tensors, strict=True)), (sizes.rank / 4 + sizes.rope) ** -0.5)
    width = sizes.kv_heads * sizes.size
    rows = (draw(batch, tokens, heads * sizes.size), draw(batch, tokens, width), draw(batch, tokens, width))
    caches = [cache(sizes.kv_heads, sizes.size) for _ in range(2)]
    tensors = (*rows, *angles(sizes, sizes.size), *caches, past, scale(sizes.kv_heads), scale(sizes.kv_heads), None)
    return Arguments(plain, dict(zip(plain.INPUTS, tensors, strict=True)), sizes.size**-0.5)


def reference(call: Arguments) -> Tensor:
    """The eager operator; writes the caches of `call`."""
    operator = latent.latent_attention if call.module is latent else plain.attention
    return operator(*call.tensors.values(), call.scale)


def run(call: Arguments, isa: str = "", threads: int = 1) -> Tensor:
    """The node in onnxruntime; writes the caches of `call`."""
    fed = {name: tensor for name, tensor in call.tensors.items() if tensor is not None}
    ports = tuple((name, _ONNX[tensor.dtype], tensor.dim()) if name in fed else ("", 0, 0)
                  for name, tensor in call.tensors.items())
    session = _session(call.module.OP_TYPE, ports, call.scale, (isa, threads))
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in fed.items()})[0])


@functools.cache
def _session(op_type: str, ports: tuple, scale: float, how: tuple[str, int]):
    node = helper.make_node(op_type, [name for name, _, _ in ports], ["y"], domain="vl2", scale=scale)
    inputs = [helper.make_tensor_value_info(name, kind, [None] * rank) for name, kind, rank in ports if name]
    graph = helper.make_graph([node], "one", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("vl2", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(LIBRARY))
    options.intra_op_num_threads, options.log_severity_level = how[1], _FATAL
    before = os.environ.get("VL2_CPU_ISA", "")
    os.environ["VL2_CPU_ISA"] = how[0] or before
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options)
    finally:
        os.environ["VL2_CPU_ISA"] = before


def caches_are_equal(got: Arguments, want: Arguments) -> bool:
    """Bit for bit, so that NaN equals NaN and rows that must not be touched are compared too."""
    return all(np.array_equal(tensor.numpy().view(np.uint8), want.caches[name].numpy().view(np.uint8))
               for name, tensor in got.caches.items())


def in_parts(call: Arguments, lengths: tuple[int, ...], execute: Callable[[Arguments], Tensor]) -> Tensor:
    """The same tokens in several calls, one behind the other; writes the caches of `call`."""
    axis = 2 if call.module is latent else 1
    outputs, start = [], 0
    for length in lengths:
        part = {name: tensor.narrow(2 if name == "query" and axis == 2 else 1, start, length).contiguous()
                for name, tensor in call.tensors.items() if tensor is not None and name not in call.caches
                and name != "past_length"}
        part |= {"past_length": call.tensors["past_length"] + start}
        outputs.append(execute(Arguments(call.module, call.tensors | part, call.scale)))
        start += length
    return torch.cat(outputs, dim=axis)

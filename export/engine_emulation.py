"""Graphs of the `trt` lowering on a CPU, as the truth that engines are compared with: no TensorRT, no speed.

Plugins are the eager bodies of `plugins/`, in float32 between inputs and outputs of float16; so are matrix products,
as a tensor core sums. All else is ONNX's own reference implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor
from torch.nn import functional as F

from vl2.plugins.attention.op import attention
from vl2.plugins.experts.moe import RULE, moe
from vl2.plugins.latent_attention.op import latent_attention
from vl2.safetensors_file import read_header

_NUMPY = {"F32": np.float32, "F16": np.float16, "I8": np.int8}
# Rows of a matrix that are dequantized at a time.
_BLOCK_ROWS = 1 << 14


class EmulatedSession:
    """Runs a graph; weights: a safetensors file whose tensors are inputs of the graph by their names, mapped."""

    def __init__(self, path: Path, weights: Path | None = None):
        self._weights = {} if weights is None else map_weights(weights)
        operators = [Experts, Attention, LatentAttention, Linear, DequantizeLinear, MatMul, Gemm, Conv, Gelu,
                     LayerNormalization]  # fmt: skip
        self._evaluator = ReferenceEvaluator(str(path), new_ops=operators)

    def run(self, names: None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs, as onnxruntime's session gives them; caches are written where they are."""
        with torch.no_grad():
            return self._evaluator.run(names, {**self._weights, **feeds})


def map_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by name, memory-mapped."""
    return {name: np.memmap(path, _NUMPY[entry.dtype], "r", entry.offset, entry.shape)
            for name, entry in read_header(path).items()}  # fmt: skip


def dequantize(packed: np.ndarray, scale: np.ndarray, scheme: str) -> Tensor:
    """Numbers float32 [.., N, K] of rows as `vl2.export.engine_storage` lays them."""
    codes = torch.from_numpy(np.array(packed))
    if scheme == "int4":
        unsigned = codes.view(torch.uint8)
        codes = torch.stack((unsigned & 0xF, unsigned >> 4), dim=-1).flatten(-2).to(torch.int16) - 8
    scales = torch.from_numpy(np.array(scale)).float()
    return (codes.float().unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)


class _Plugin(OpRun):  # the evaluator knows operators by their class names
    op_domain = "vl2"


def _wide(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array)).float()


def _half(y: Tensor) -> np.ndarray:
    return y.half().numpy()


class _Inputs:
    """The inputs of a node, taken one after the other."""

    def __init__(self, arrays: tuple[np.ndarray, ...]):
        self._arrays = iter(arrays)

    def floats(self) -> Tensor:
        return _wide(next(self._arrays))

    def matrix(self, scheme: str) -> Tensor:
        """One input, or codes and scales."""
        return self.floats() if scheme == "fp16" else dequantize(next(self._arrays), next(self._arrays), scheme)


class Experts(_Plugin):
    def _run(self, *arrays, **given):
        inputs = _Inputs(arrays)
        x, logits = inputs.floats(), inputs.floats()
        routed = [inputs.matrix(given[key]) for key in ("scheme", "scheme", "down_scheme")]
        bias = inputs.floats() if given["topk_method"] == "noaux_tc" else None
        keys = ("shared_scheme", "shared_scheme", "shared_down_scheme")
        shared = [inputs.matrix(given[key]) for key in keys] if given["shared_size"] else [None] * 3
        rule = {**given, "num_experts_per_tok": given["top_k"]}
        return (_half(moe(x, logits, *routed, bias, *shared, *(kind(rule[name]) for name, kind in RULE.items()))),)


class Attention(_Plugin):
    def _run(self, *arrays, scale=None, **_):
        *wide, key_cache, value_cache, past_length = arrays
        caches = [torch.from_numpy(key_cache), torch.from_numpy(value_cache)]
        y = attention(*map(_wide, wide), *caches, torch.tensor(int(past_length)), None, None, None, scale)
        return _half(y), key_cache, value_cache


class LatentAttention(_Plugin):
    def _run(self, *arrays, scale=None, **_):
        *wide, cache, past_length = arrays
        length = torch.tensor(int(past_length))
        y = latent_attention(*map(_wide, wide), torch.from_numpy(cache), length, None, None, scale)
        return _half(y), cache


class Linear(_Plugin):
    def _run(self, x, packed, scale, scheme=None, **_):
        wide = _wide(x)
        blocks = [slice(start, start + _BLOCK_ROWS) for start in range(0, len(packed), _BLOCK_ROWS)]
        parts = [F.linear(wide, dequantize(packed[rows], scale[rows], scheme)) for rows in blocks]
        return (_half(torch.cat(parts, dim=-1)),)


class DequantizeLinear(OpRun):
    def _run(self, codes, scale, axis=None, **_):
        assert axis == codes.ndim - 1 and scale.ndim == 1, "the lowering writes a scale a column only"
        return ((_wide(codes) * _wide(scale)).numpy().astype(scale.dtype),)


class MatMul(OpRun):
    def _run(self, a, b):
        return ((_wide(a) @ _wide(b)).numpy().astype(a.dtype),)


class Gemm(OpRun):
    def _run(self, a, b, transB=None, **_):
        assert transB == 1, "the lowering writes x · Wᵀ only"
        return (F.linear(_wide(a), _wide(b)).numpy().astype(a.dtype),)


class Conv(OpRun):
    def _run(self, x, w, b=None, **given):
        y = F.conv2d(_wide(x), _wide(w), None if b is None else _wide(b), stride=given["strides"])
        assert not any(given["pads"]), "patches do not overlap the border"
        return (y.numpy().astype(x.dtype),)


class Gelu(OpRun):
    def _run(self, x, approximate=None):
        return (F.gelu(_wide(x), approximate=approximate).numpy().astype(x.dtype),)


class LayerNormalization(OpRun):
    def _run(self, x, scale, bias, epsilon=None, **_):
        return (F.layer_norm(_wide(x), scale.shape, _wide(scale), _wide(bias), epsilon).numpy(),)



"""How each parameter of an export is stored and by which operators it is used: one table for plan, graphs, files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vl2.errors import VL2Error
from vl2.export.engine_storage import column_storage, row_storage
from vl2.export.graphs import KV_CACHES
from vl2.export.native_storage import NativeStorage, native_storage
from vl2.export.packed_storage import (
    PackedStorage,
    Packing,
    blobs_and_scales,
    block_for,
    codes_and_scales,
)
from vl2.export.schemes import FLOAT16, FLOAT32, ROUTER, Storage, storage_of
from vl2.operators import library_path
from vl2.quantization import Form

PORTABLE, ORT, CPU, TRT = "portable", "ort", "cpu", "trt"
EXACT, FAST = "exact", "fast"
LOWERINGS = (PORTABLE, ORT, CPU, TRT)

# Uses of a weight. FLOATS: as numbers, widened where they are stored narrower.
FLOATS = "floats"
DEQUANTIZE = "dequantize"  # DequantizeLinear
MULTIPLY = "multiply"  # Cast, then Mul by the scales: for matrices that many rows meet at once
NBITS = "nbits"  # com.microsoft MatMulNBits
NATIVE = "native"  # the operator library of plugins/
ROWS = "rows"  # the plugins of engines
COLUMNS = "columns"  # DequantizeLinear of a transposed matrix, which TensorRT multiplies by

_EMBEDDINGS = "language.embed_tokens.weight"
# Not a Linear in the graph: read by head, as W_k and W_v, in a batched MatMul.
_BY_HEAD = ".kv_b_proj.weight"
_MANY_ROWS = ("vision.", "projector.")


@dataclass(frozen=True)
class Storing:
    """scheme: of all that is not packed; shapes: of the model's parameters; forms: of the packed ones, and the element
    type of their scales; kv_cache: element type of the caches where the decoder writes them in place; mode: of the
    operators of `plugins/`."""

    scheme: str
    lowering: str
    shapes: Mapping[str, tuple[int, ...]]
    forms: Mapping[str, Form] = field(default_factory=dict)
    scales: Mapping[str, Storage] = field(default_factory=dict)
    kv_cache: str | None = None
    mode: str = EXACT

    def use_of(self, parameter: str) -> str:
        """One of the uses above."""
        form = self.forms.get(parameter)
        if self.lowering == CPU and self._is_multiplied(parameter):
            return NATIVE
        if form is None:
            return FLOATS
        if self.lowering == PORTABLE or parameter == _EMBEDDINGS:
            return DEQUANTIZE
        if self.lowering == TRT:
            return self._engine_use(parameter, form)
        if parameter.endswith(_BY_HEAD):
            return FLOATS
        if form.bits == 8 and parameter.startswith(_MANY_ROWS):
            return MULTIPLY
        return DEQUANTIZE if block_for(form, self.shapes[parameter][-1]) is None else NBITS

    def _engine_use(self, parameter: str, form: Form) -> str:
        """Of the tower, TensorRT's own products take INT8 with a float16 scale a row; the plugins take all else."""
        if not parameter.startswith(_MANY_ROWS):
            return FLOATS if parameter.endswith(_BY_HEAD) else ROWS
        whole = Packing(form, self.shapes[parameter][-1]).groups == 1 and self._is_multiplied(parameter)
        return COLUMNS if whole and form.bits == 8 and self.scales.get(parameter, FLOAT16) == FLOAT16 else FLOATS

    def _is_multiplied(self, parameter: str) -> bool:
        """Whether a parameter is the matrix of a Linear, or a stack of them, and nothing else."""
        stacked = ".mlp.experts." in parameter
        other = (_EMBEDDINGS, ROUTER, _BY_HEAD)
        return len(self.shapes[parameter]) == (3 if stacked else 2) and not parameter.endswith(other)

    def parts_of(self, parameter: str) -> list[Storage | PackedStorage | NativeStorage]:
        """What a parameter, or each matrix of a stack, is stored as; none where it lies in another's part."""
        use, shape = self.use_of(parameter), self.shapes[parameter]
        if use == NATIVE:
            if self.scheme != "fp16":
                raise VL2Error(f"the lowering `cpu` holds codes and float16; the scheme `{self.scheme}` was asked for",
                               "use --scheme fp16, int8 or int4, or --lowering portable")  # fmt: skip
            return native_storage(parameter, shape, self.forms, self.scales)
        if use == FLOATS:
            if self.lowering == TRT:
                return [self._half(parameter, shape)]
            # codes times scales have up to 19 bits, which float16 does not hold
            return [FLOAT32 if parameter in self.forms else storage_of(parameter, shape, self.scheme)]
        form, scales = self.forms[parameter], self.scales.get(parameter, FLOAT16)
        if use == COLUMNS:
            return column_storage(shape, form)
        if use == ROWS:
            return row_storage(parameter, shape, form, scales)
        if use == NBITS:
            return blobs_and_scales(Packing(form, shape[-1], block_for(form, shape[-1])), scales)
        return codes_and_scales(Packing(form, shape[-1]), scales)

    def _half(self, parameter: str, shape: tuple[int, ...]) -> Storage:
        """Of floats in engines, whose matrices are float16 whatever they were."""
        if self.scheme != "fp16":
            raise VL2Error(f"the lowering `trt` holds codes and float16; the scheme `{self.scheme}` was asked for",
                           "use --scheme fp16, int8 or int4, or --lowering portable")  # fmt: skip
        return storage_of(parameter, shape, self.scheme)

    def size_bytes(self, parameter: str) -> int:
        """Bytes of a parameter in the data file, without gaps."""
        shape = self.shapes[parameter]
        parts = self.parts_of(parameter)
        if len(parts) < 2:
            return sum(part.size_bytes(shape, len(shape) - 1) for part in parts)
        copies, matrix = (shape[0], shape[1:]) if len(shape) == 3 else (1, shape)
        return copies * sum(part.size_bytes(matrix, len(matrix) - 1) for part in parts)


def check_lowering(lowering: str | None, quantized: bool, kv_cache: str | None = None) -> str:
    """The lowering to take. Unless told, for quantized checkpoints the fastest that works on this machine, for others
    `portable`, and `cpu` where the cache needs it. Raises VL2Error."""
    if lowering is None:
        if kv_cache not in (None, "fp32"):
            return CPU
        return _fastest_here() if quantized else PORTABLE
    if lowering not in LOWERINGS:
        raise VL2Error(f"there is no lowering `{lowering}`", f"choose one of {', '.join(LOWERINGS)}")
    if lowering == ORT and not quantized:
        raise VL2Error("the lowering `ort` is for quantized checkpoints: it changes how packed matrices are multiplied",
                       "leave --lowering out, or quantize the checkpoint first")  # fmt: skip
    return lowering


def check_mode(mode: str | None, lowering: str) -> str:
    """The mode of the operators, `exact` unless told. Raises VL2Error."""
    if mode not in (None, EXACT, FAST):
        raise VL2Error(f"there is no mode `{mode}`", f"choose {EXACT} or {FAST}")
    if mode == FAST and lowering != CPU:
        raise VL2Error(f"the mode `fast` was asked for with the lowering `{lowering}`, which has none",
                       "give --lowering cpu as well, or leave --mode out")  # fmt: skip
    return mode or EXACT


def _fastest_here() -> str:
    """The operator library is for CPUs, and for machines on which it could be built."""
    from onnxruntime import get_available_providers

    return ORT if "CUDAExecutionProvider" in get_available_providers() or library_path()[0] is None else CPU


def check_kv_cache(kv_cache: str | None, lowering: str) -> str | None:
    """The element type of caches written in place, float32 unless told; None in other lowerings. Raises VL2Error."""
    if kv_cache not in (None, *KV_CACHES):
        raise VL2Error(f"there is no KV cache `{kv_cache}`", f"choose one of {', '.join(KV_CACHES)}")
    if lowering == CPU:
        return KV_CACHES[kv_cache or "fp32"]
    if lowering == TRT and kv_cache in (None, "fp16"):
        return KV_CACHES["fp16"]
    if lowering == TRT:
        raise VL2Error(f"the KV cache `{kv_cache}` was asked for with the lowering `trt`, whose caches are fp16",
                       "leave --kv-cache out")
    if kv_cache not in (None, "fp32"):
        raise VL2Error(f"the KV cache `{kv_cache}` was asked for with the lowering `{lowering}`, whose caches are fp32",
                       "give --lowering cpu as well, or leave --kv-cache out")  # fmt: skip
    return None

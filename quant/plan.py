"""What a recipe will take on disk, from the configuration alone: for --dry-run and for choosing a recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from vl2.config import ModelConfig
from vl2.model.checkpoint import expected_tensors
from vl2.modules import module_of
from vl2.quant.linears import WEIGHT
from vl2.quant.packing import packed_columns
from vl2.quant.quantization_config import Form, form_of
from vl2.quant.scheme import Scheme
from vl2.quant.source import Source
from vl2.safetensors_file import DTYPE_BYTES

_SCALE_BYTES, _WORD_BYTES, _SHAPE_BYTES = 2, 4, 16
_ENTRY_BYTES = 85  # of a tensor in a header beside its name: dtype, shape, offsets
_FOLDED = re.compile(r"language\.model\.layers\.\d+\.(.*layernorm|mlp\.gate)\.weight")


def planned_sizes(config: ModelConfig, schemes: Mapping[str, Scheme | None], kept_bytes: int = 2) -> dict[str, int]:
    """Bytes by module (`vl2.modules`) of the checkpoint that `assign_schemes`' result leads to, without headers.

    kept_bytes: a number's size in the source, 2 for bfloat16. Folds store a norm or router as float32, which adds less
    than a thousandth.
    """
    sizes: dict[str, int] = {}
    for name, shape in expected_tensors(config).items():
        form = form_of(schemes.get(name.removesuffix(WEIGHT))) if name.endswith(WEIGHT) else None
        size = math.prod(shape) * kept_bytes if form is None else stored_bytes(form, *shape)
        sizes[module_of(name)] = sizes.get(module_of(name), 0) + size
    return dict(sorted(sizes.items()))


def planned_file_bytes(source: Source, schemes: Mapping[str, Scheme | None], folds: bool) -> int:
    """Bytes of the quantized checkpoint's safetensors files, a little too many.

    folds: whether the method stores norms and routers anew in float32; here it does so everywhere. A tensor's entry in
    a header is taken a few bytes too long.
    """
    total = 0
    for name, entry in source.entries.items():
        form = form_of(schemes.get(name.removesuffix(WEIGHT))) if name.endswith(WEIGHT) else None
        if form is not None:
            total += stored_bytes(form, *entry.shape) + 3 * (len(name) + _ENTRY_BYTES)
            continue
        widened = folds and _FOLDED.fullmatch(name) is not None
        total += math.prod(entry.shape) * (4 if widened else DTYPE_BYTES[entry.dtype]) + len(name) + _ENTRY_BYTES
    return total


def stored_bytes(form: Form, rows: int, columns: int, scale_bytes: int = _SCALE_BYTES) -> int:
    """Bytes of a matrix's packed codes, scales (`scale_bytes` each) and shape."""
    words = rows * packed_columns(columns, form.bits)
    return words * _WORD_BYTES + rows * form.scale_columns(columns) * scale_bytes + _SHAPE_BYTES

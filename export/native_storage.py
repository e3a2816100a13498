"""How matrices are stored for the operator library of `plugins/`: the layout of `vl2.plugins.native.layout`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from vl2.errors import VL2Error
from vl2.export.schemes import FLOAT16, Storage
from vl2.plugins.native.layout import ROWS, Layout, layout_for
from vl2.quantization import Form

_GATE, _UP = "gate_proj", "up_proj"
# Where one operator reads gate and up, by turns of 16 rows.
_JOINED = (".mlp.experts.", ".mlp.shared_experts.")


@dataclass(frozen=True)
class NativeStorage:
    """Matrices of one layout, one after another. partner: the parameter whose rows stand between this one's."""

    layout: Layout
    copies: int = 1
    partner: str | None = None
    onnx_dtype = ir.DataType.UINT8

    def shape_of(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """Bytes, whatever the weight's shape."""
        return (self.copies * self.layout.size_bytes,)

    def size_bytes(self, shape: tuple[int, ...], axis: int) -> int:
        """As `Storage.size_bytes`."""
        return self.copies * self.layout.size_bytes


def native_storage(
    parameter: str, shape: tuple[int, ...], forms: Mapping[str, Form], scales: Mapping[str, Storage]
) -> list[NativeStorage]:
    """The one storage of a matrix [N, K] or stack [E, N, K]; none for an up-projection, which lies with its gate.

    Raises VL2Error where the library cannot hold it, or a gate and its up-projection are quantized in two ways.
    """
    partner = None
    if any(place in parameter for place in _JOINED):
        if _UP in parameter:
            return []
        partner = parameter.replace(_GATE, _UP) if _GATE in parameter else None
    form, scale = forms.get(parameter), scales.get(parameter)
    if partner is not None and (forms.get(partner), scales.get(partner)) != (form, scale):
        raise VL2Error(f"`{parameter}` and `{partner}` are quantized in two ways",
                       "the lowering `cpu` reads both as one: give them one scheme")  # fmt: skip
    *copies, rows, columns = shape
    if partner is not None:
        rows = 2 * -(-rows // ROWS) * ROWS
    if form is None:
        layout = layout_for((rows, columns), "fp16")
    else:
        dtype = "float16" if scale == FLOAT16 else "float32"
        layout = layout_for((rows, columns), f"int{form.bits}", form.scale_columns(columns), dtype)
    return [NativeStorage(layout, *copies, partner=partner)]

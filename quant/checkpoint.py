"""Reading a quantized checkpoint: codes and scales as they lie in the file, or dequantized tensors by their names.

A quantized module X has `X.weight_packed` int32 [N, ⌈K·b/32⌉], `X.weight_scale` float16 or bfloat16 [N, K/g],
`X.weight_shape` int64 [2] in place of `X.weight`; everything else is as in the checkpoint it was made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vl2.config import load_config
from vl2.errors import VL2Error
from vl2.json_file import read_json
from vl2.model.checkpoint import check_checkpoint, read_tensor, unused_tensors
from vl2.model.packed import read_codes, read_scales
from vl2.quant.affine import Quantized
from vl2.quant.linears import WEIGHT, matrices
from vl2.quant.packing import pack
from vl2.quant.quantization_config import Form
from vl2.quantization import PACKED, SCALE, SHAPE
from vl2.safetensors_file import TensorEntry

__all__ = ["PACKED", "SCALE", "SHAPE", "QuantizedCheckpoint", "TensorReader", "is_quantized", "packed_tensors"]


def is_quantized(folder: Path) -> bool:
    """Whether config.json has a `quantization_config`."""
    return "quantization_config" in read_json(Path(folder) / "config.json")


def packed_tensors(module: str, quantized: Quantized) -> dict[str, Tensor]:
    """The three tensors that stand for `module`'s weight."""
    return {
        module + PACKED: pack(quantized.codes, quantized.bits),
        module + SCALE: quantized.scales,
        module + SHAPE: torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }


class TensorReader(Mapping[str, Tensor]):
    """Tensors by the names of the unquantized checkpoint, each read and dequantized (float32) when it is asked for."""

    def __init__(self, entries: Mapping[str, TensorEntry], forms: Mapping[str, Form | None]):
        self._entries = entries
        self._forms = forms
        self._plain = dict.fromkeys(_plain_name(name) for name in entries if not name.endswith((SCALE, SHAPE)))

    def __getitem__(self, name: str) -> Tensor:
        module = name.removesuffix(WEIGHT)
        if module + PACKED in self._entries:
            return self.quantized(module).dequantize()
        return read_tensor(self._entries[name])

    def __contains__(self, name: object) -> bool:
        return name in self._plain

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)

    def quantized(self, module: str) -> Quantized:
        """Codes and scales of a quantized module; the scales in float16 if the file has that, else float32."""
        form = self._forms[module]
        scales = read_scales(self._entries, module)
        scales = scales if scales.dtype == torch.float16 else scales.float()
        return Quantized(read_codes(self._entries, module, form), scales, form.bits)


class QuantizedCheckpoint:
    """A quantized checkpoint folder, checked from its headers alone.

    config: the model's; forms: how every matrix is stored (None: as it was); tensors: by the names of the unquantized
    checkpoint. Raises VL2Error naming a missing, left-over, misshapen or wrongly typed tensor, and what
    `quantization_config` asks for that we do not read.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.config = load_config(self.folder)
        if self.config.quantization_config is None:
            raise VL2Error(f"{self.folder / 'config.json'} has no `quantization_config`", "it is not quantized")
        self.forms = {module: self.config.quantization_config.form_of(module) for module in matrices(self.config)}
        self.entries = check_checkpoint(self.folder, self.config)
        self.tensors = TensorReader(self.entries, self.forms)

    def quantized(self, module: str) -> Quantized:
        """Codes and scales of a module whose form is not None; bundles are written from these, never re-quantized."""
        return self.tensors.quantized(module)

    def iter_dequantized(self) -> Iterator[tuple[str, Tensor]]:
        """Name and data of every tensor of the model as the unquantized checkpoint names it, one in memory at a time.

        Quantized ones come as float32, the others in the file's dtype; tensors that the model does not use are left
        out, as by `vl2.model.checkpoint.iter_tensors`.
        """
        unused = unused_tensors(self.config)
        for name in self.tensors:
            if name not in unused:
                yield name, self.tensors[name]


def _plain_name(name: str) -> str:
    return name.removesuffix(PACKED) + WEIGHT if name.endswith(PACKED) else name

"""The checkpoint as the exporter reads it: one tensor at a time, found by parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vl2.config import ModelConfig, load_config
from vl2.errors import VL2Error
from vl2.export.packed_storage import scale_storage_of
from vl2.export.storing import Storing
from vl2.export.weights import Weight, arrange
from vl2.model.checkpoint import check_checkpoint, packed_forms, parameter_shapes, parameter_sources
from vl2.model.packed import read_codes, read_dequantized, read_scales, rows_of
from vl2.model.tensors import read_tensor
from vl2.quantization import PACKED, SCALE, WEIGHT, Form
from vl2.safetensors_file import TensorEntry

Rows = tuple[int, int] | None


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder; headers only, no weights. forms: of the packed matrices, by module."""

    folder: Path
    config: ModelConfig
    entries: dict[str, TensorEntry]
    sources: dict[str, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]
    forms: dict[str, Form]

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, in name order."""
        return sorted({entry.path for entry in self.entries.values()})

    @property
    def quantized(self) -> bool:
        """Whether any of its matrices lie packed."""
        return self.config.quantization_config is not None

    def form(self, parameter: str) -> Form | None:
        """How a parameter was quantized; None for floats."""
        return self.forms.get(self.sources[parameter][0].removesuffix(WEIGHT))

    def entry(self, weight: Weight) -> TensorEntry:
        """The file tensor that a weight is made of (the first, for a whole stack; the codes, where it is packed)."""
        name = self.sources[weight.parameter][weight.expert or 0]
        return self.entries[name] if name in self.entries else self.entries[name.removesuffix(WEIGHT) + PACKED]

    def read(self, weight: Weight) -> Tensor:
        """A weight's numbers: in the dtype of the file, packed ones dequantized to float32.

        Raises VL2Error on a cut-off file, NaN or infinity.
        """
        return self._arranged(weight, self._read_floats)

    def read_codes(self, weight: Weight) -> Tensor:
        """int8 codes of a packed weight, in its shape."""
        return self._arranged(weight, self._read_codes)

    def read_scales(self, weight: Weight) -> Tensor:
        """Scales of a packed weight, in its shape but for the inputs, in the dtype of the file."""
        entry = self.entry(weight)
        groups = self.entries[entry.name.removesuffix(PACKED) + SCALE].shape[1]
        return self._arranged(weight.with_inputs(groups), self._read_scales)

    def _arranged(self, weight: Weight, read: Callable[[str, Rows], Tensor]) -> Tensor:
        names, layout, rows = self.sources[weight.parameter], weight.layout, None
        if weight.expert is not None:
            names = names[weight.expert : weight.expert + 1]
        if len(names) > 1:
            # a block of experts is read without the others
            if layout and layout[0][0] == "narrow" and layout[0][1][0] == 0:
                _, start, count = layout[0][1]
                names, layout = names[start : start + count], layout[1:]
            return arrange(torch.stack([read(name, None) for name in names]), layout)
        if layout and layout[0][0] == "narrow" and layout[0][1][0] == 0:
            rows, layout = layout[0][1][1:], layout[1:]
        return arrange(read(names[0], rows), layout)

    def _read_floats(self, name: str, rows: Rows) -> Tensor:
        module = name.removesuffix(WEIGHT)
        if module in self.forms:
            return read_dequantized(self.entries, module, self.forms[module], rows)
        entry = self.entries[name]
        return read_tensor(entry if rows is None else rows_of(entry, *rows))

    def _read_codes(self, name: str, rows: Rows) -> Tensor:
        module = name.removesuffix(WEIGHT)
        return read_codes(self.entries, module, self.forms[module], rows)

    def _read_scales(self, name: str, rows: Rows) -> Tensor:
        return read_scales(self.entries, name.removesuffix(WEIGHT), rows)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads config and headers and checks names, shapes and dtypes of all tensors; raises VL2Error."""
    if not folder.is_dir():
        raise VL2Error(f"there is no checkpoint folder {folder}", "give one with config.json and safetensors files")
    config = load_config(folder)
    scaling = config.language_config.rope_scaling
    if scaling is not None and scaling.type == "dynamic":
        raise VL2Error(
            "`language_config.rope_scaling.type` is 'dynamic', which cannot be exported: its frequencies depend on "
            "the length of the text, a cache holds keys that were rotated by those of a shorter one",
            "no published DeepSeek-VL2 uses it; 'linear' and 'yarn' are exported",
        )
    entries, sources = check_checkpoint(folder, config), parameter_sources(config)
    forms = packed_forms(config)
    _check_stacks(sources, forms)
    return Checkpoint(folder, config, entries, sources, parameter_shapes(config), forms)


def storing_of(checkpoint: Checkpoint, scheme: str, lowering: str) -> Storing:
    """How an export of this checkpoint stores its parameters; scheme: of those that are not packed."""
    forms = {name: form for name in checkpoint.shapes if (form := checkpoint.form(name)) is not None}
    scales = {name: scale_storage_of(_scale_dtype(checkpoint, name)) for name in forms}
    return Storing(scheme, lowering, checkpoint.shapes, forms, scales)


def _scale_dtype(checkpoint: Checkpoint, parameter: str) -> str:
    """The dtype of a parameter's scales; F32 where its experts have several."""
    names = (source.removesuffix(WEIGHT) + SCALE for source in checkpoint.sources[parameter])
    dtypes = {checkpoint.entries[name].dtype for name in names}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _check_stacks(sources: dict[str, tuple[str, ...]], forms: dict[str, Form]) -> None:
    for names in sources.values():
        modules = [name.removesuffix(WEIGHT) for name in names]
        other = next((module for module in modules if forms.get(module) != forms.get(modules[0])), None)
        if other is not None:
            raise VL2Error(f"`{modules[0]}` and `{other}` are quantized in two ways",
                           "the experts of a layer are exported as one: give them one scheme")  # fmt: skip

"""The checkpoint as the exporter reads it: one tensor at a time, found by parameter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vl2.config import ModelConfig, load_config
from vl2.errors import VL2Error
from vl2.export.weights import Weight, arrange
from vl2.model.checkpoint import check_checkpoint, parameter_shapes, parameter_sources, read_tensor
from vl2.safetensors_file import TensorEntry


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder; headers only, no weights."""

    folder: Path
    config: ModelConfig
    entries: dict[str, TensorEntry]
    sources: dict[str, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, in name order."""
        return sorted({entry.path for entry in self.entries.values()})

    def entry(self, weight: Weight) -> TensorEntry:
        """The file tensor that a weight is made of (the first, for a whole stack)."""
        return self.entries[self.sources[weight.parameter][weight.expert or 0]]

    def read(self, weight: Weight) -> Tensor:
        """A weight's numbers in the dtype of the file. Raises VL2Error on a cut-off file, NaN or infinity."""
        entries = [self.entries[name] for name in self.sources[weight.parameter]]
        if weight.expert is not None:
            entries = entries[weight.expert : weight.expert + 1]
        if len(entries) > 1:
            return arrange(torch.stack([read_tensor(entry) for entry in entries]), weight.layout)
        entry, layout = entries[0], weight.layout
        if layout and layout[0][0] == "narrow" and layout[0][1][0] == 0:
            entry, layout = _rows(entry, *layout[0][1][1:]), layout[1:]
        return arrange(read_tensor(entry), layout)


def _rows(entry: TensorEntry, start: int, length: int) -> TensorEntry:
    """Part of a tensor, as if it were one of its own in the file."""
    row_bytes = entry.size_bytes // entry.shape[0]
    return replace(
        entry,
        shape=(length, *entry.shape[1:]),
        offset=entry.offset + start * row_bytes,
        size_bytes=length * row_bytes,
    )


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
    return Checkpoint(
        folder, config, check_checkpoint(folder, config), parameter_sources(config), parameter_shapes(config)
    )

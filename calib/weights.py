"""Parts of a checkpoint, read when they are needed and never all at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from vl2.config import ModelConfig, load_config
from vl2.errors import VL2Error
from vl2.model.checkpoint import DTYPES, all_finite, check_checkpoint, check_unquantized, parameter_sources, read_tensor
from vl2.safetensors_file import TensorEntry

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Weights:
    """A checkpoint folder whose tensors are on disk. sources: parameter of the model → tensors of the file."""

    folder: Path
    config: ModelConfig
    entries: Mapping[str, TensorEntry]
    sources: Mapping[str, tuple[str, ...]]

    def read(self, name: str) -> Tensor:
        """The tensor `name` of the file as float32."""
        return read_tensor(self.entries[name]).float()

    def parameter(self, name: str) -> Tensor:
        """The parameter `name` of the model, one that is not stacked, as float32."""
        (source,) = self.sources[name]
        return self.read(source)


def open_weights(folder: Path | str) -> Weights:
    """Checks the folder from its headers alone; raises VL2Error as `load_config` and `check_checkpoint` do."""
    config = load_config(folder)
    check_unquantized(folder, config)
    return Weights(Path(folder), config, check_checkpoint(folder, config), parameter_sources(config))


def load_part(
    weights: Weights, build: Callable[[], Module], prefix: str, replaced: Mapping[str, Tensor] | None = None
) -> Module:
    """What `build` makes, filled in float32 with the parameters named `prefix` + their names, in eval mode.

    replaced: tensors that stand for the file's, by the file's names.
    """
    replaced = replaced or {}
    with torch.device("meta"):
        module = build()
    state = {}
    for name in module.state_dict():
        (source,) = weights.sources[prefix + name]
        state[name] = replaced[source].float() if source in replaced else weights.read(source)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval()


def read_rows(weights: Weights, parameter: str, rows: Sequence[int]) -> Tensor:
    """Rows of a matrix, float32 [len(rows), columns], without reading the others.

    Raises VL2Error naming the tensor on a NaN or infinity, and on a row that it does not have.
    """
    (source,) = weights.sources[parameter]
    entry = weights.entries[source]
    count, columns = entry.shape
    size = entry.size_bytes // count
    data = bytearray()
    with entry.path.open("rb", buffering=0) as file:
        for row in rows:
            if not 0 <= row < count:
                raise VL2Error(f"tensor `{source}` in {entry.path} has {count} rows, the prompt needs row {row}",
                               "tokenizer.json and the weights must come from the same model")
            data += os.pread(file.fileno(), size, entry.offset + row * size)
    tensor = torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(len(rows), columns)
    if not all_finite(tensor):
        raise VL2Error(f"tensor `{source}` in {entry.path} holds NaN or infinity", "fetch the file again")
    return tensor.float()

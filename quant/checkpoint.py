"""Reading a quantized checkpoint: codes and scales as they lie in the file, or dequantized tensors by their names.

A quantized module X has `X.weight_packed` int32 [N, ⌈K·b/32⌉], `X.weight_scale` float16 or bfloat16 [N, K/g],
`X.weight_shape` int64 [2] in place of `X.weight`; everything else is as in the checkpoint it was made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vl2.config import ModelConfig
from vl2.errors import VL2Error
from vl2.json_file import read_json
from vl2.model.checkpoint import DTYPES, expected_tensors, read_tensor, unused_tensors
from vl2.quant.affine import Quantized
from vl2.quant.linears import WEIGHT, matrices
from vl2.quant.packing import pack, packed_columns, unpack
from vl2.quant.quantization_config import Form, read_config
from vl2.safetensors_file import TensorEntry, checkpoint_entries

PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_INTEGERS = {"I32": torch.int32, "I64": torch.int64}


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
        rows, columns = _read_integers(self._entries[module + SHAPE]).tolist()
        words = _read_integers(self._entries[module + PACKED])
        scales = read_tensor(self._entries[module + SCALE])
        if bool((scales <= 0).any()):
            raise VL2Error(f"`{module}{SCALE}` has a scale of {float(scales.min()):g}, expected more than 0")
        scales = scales if scales.dtype == torch.float16 else scales.float()
        return Quantized(unpack(words.view(rows, -1), form.bits, columns), scales, form.bits)


class QuantizedCheckpoint:
    """A quantized checkpoint folder, checked from its headers alone.

    config: the model's; forms: how every matrix is stored (None: as it was); tensors: by the names of the unquantized
    checkpoint. Raises VL2Error naming a missing, left-over, misshapen or wrongly typed tensor, and what
    `quantization_config` asks for that we do not read.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.config, self.forms = _read_forms(self.folder)
        self.entries = checkpoint_entries(self.folder)
        _check_entries(self.folder, self.config, self.forms, self.entries)
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


def _read_forms(folder: Path) -> tuple[ModelConfig, dict[str, Form | None]]:
    path = folder / "config.json"
    values = read_json(path)
    if "quantization_config" not in values:
        raise VL2Error(f"{path} has no `quantization_config`", "this checkpoint is not quantized")
    quantization: Any = values.pop("quantization_config")
    try:
        config = ModelConfig.from_dict(values)
        return config, read_config(quantization, matrices(config))
    except VL2Error as error:
        raise VL2Error(f"{path}: {error.message}", error.hint) from error


def _check_entries(
    folder: Path, config: ModelConfig, forms: Mapping[str, Form | None], entries: Mapping[str, TensorEntry]
) -> None:
    expected = _expected(config, forms)
    for name, (shape, dtypes) in expected.items():
        if name not in entries:
            raise VL2Error(f"{folder} lacks the tensor `{name}` that its config.json asks for")
        entry = entries[name]
        if entry.shape != shape:
            raise VL2Error(f"`{name}` in {entry.path} has the shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in dtypes:
            raise VL2Error(f"`{name}` in {entry.path} has the dtype {entry.dtype}, expected {' or '.join(dtypes)}")
    for name, entry in entries.items():
        if name not in expected:
            raise VL2Error(
                f"`{name}` in {entry.path} is not part of the model that config.json describes",
                "asymmetric grids (weight_zero_point) and reordered groups (weight_g_idx) are not read",
            )


def _expected(
    config: ModelConfig, forms: Mapping[str, Form | None]
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and allowed dtypes of every tensor of the file."""
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for name, shape in expected_tensors(config).items():
        module = name.removesuffix(WEIGHT)
        form = forms.get(module) if name.endswith(WEIGHT) else None
        if form is None:
            expected[name] = (shape, tuple(DTYPES))
            continue
        rows, columns = shape
        expected[module + PACKED] = ((rows, packed_columns(columns, form.bits)), ("I32",))
        expected[module + SCALE] = ((rows, form.scale_columns(columns)), tuple(DTYPES))
        expected[module + SHAPE] = ((2,), ("I64",))
    return expected


def _plain_name(name: str) -> str:
    return name.removesuffix(PACKED) + WEIGHT if name.endswith(PACKED) else name


def _read_integers(entry: TensorEntry) -> Tensor:
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        data = bytearray(file.read(entry.size_bytes))
    if len(data) != entry.size_bytes:
        raise VL2Error(f"`{entry.name}` in {entry.path} is cut off after {len(data)} of {entry.size_bytes} bytes")
    return torch.frombuffer(data, dtype=_INTEGERS[entry.dtype]).view(entry.shape)

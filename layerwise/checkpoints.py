"""A checkpoint and its quantized form, opened side by side; nothing but headers is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from vl2.calib.calibration_set import checkpoint_source
from vl2.calib.weights import Weights, open_weights
from vl2.config import ModelConfig, load_config
from vl2.errors import VL2Error
from vl2.json_file import read_json
from vl2.manifest import MANIFEST_NAME
from vl2.model.checkpoint import check_checkpoint, packed_forms, parameter_sources
from vl2.model.packed import read_dequantized, read_integers, rows_of
from vl2.model.tensors import read_tensor
from vl2.quant.method import method_named
from vl2.quant.publish import DESCRIPTION_NAME
from vl2.quantization import SHAPE, WEIGHT, Form

_PROMPT_FILES = ("tokenizer.json", "processor_config.json")


@dataclass(frozen=True)
class StoredWeights(Weights):
    """Weights of which some lie packed. forms: module → how its matrix is packed."""

    forms: Mapping[str, Form] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """The tensor `name` as the unquantized checkpoint names it, dequantized, float32."""
        form = self.form_of(name)
        if form is None:
            return super().read(name)
        return read_dequantized(self.entries, name.removesuffix(WEIGHT), form)

    def rows(self, name: str, start: int, length: int) -> Tensor:
        """Some rows of the matrix `name`, float32 [length, K]."""
        form = self.form_of(name)
        if form is None:
            return read_tensor(rows_of(self.entries[name], start, length)).float()
        return read_dequantized(self.entries, name.removesuffix(WEIGHT), form, (start, length))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of the matrix as it is dequantized."""
        if self.form_of(name) is None:
            return self.entries[name].shape
        return tuple(read_integers(self.entries[name.removesuffix(WEIGHT) + SHAPE]).tolist())

    def form_of(self, name: str) -> Form | None:
        return self.forms.get(name.removesuffix(WEIGHT)) if name.endswith(WEIGHT) else None


@dataclass(frozen=True)
class Pair:
    """reference: the unquantized checkpoint; quantized: what is held against it; folded: its method divides norms and
    rows by scales that the matrices behind them take (AWQ), so that matrices are compared after the scale is out."""

    reference: StoredWeights
    quantized: StoredWeights
    folded: bool

    @property
    def config(self) -> ModelConfig:
        return self.reference.config


def open_pair(reference: Path, quantized: Path) -> Pair:
    """Checks both from their headers.

    Raises VL2Error as `open_weights` does, and where the two are not one model: another configuration, tokenizer or
    processor.
    """
    if (quantized / MANIFEST_NAME).is_file():
        raise VL2Error(f"{quantized} is a bundle, whose graphs show no layers",
                       "give the quantized checkpoint that it was exported from")
    plain = open_weights(reference)
    config = load_config(quantized)
    unpacked = replace(config, quantization_config=None)
    if unpacked != plain.config:
        raise VL2Error(f"config.json of {quantized} describes another model than that of {reference}",
                       "give the checkpoint that the quantized one was made from")
    for name in _PROMPT_FILES:
        if (reference / name).read_bytes() != (quantized / name).read_bytes():
            raise VL2Error(f"{name} of {quantized} differs from that of {reference}",
                           "both must see the same tokens and tiles")
    entries = check_checkpoint(quantized, config)
    stored = StoredWeights(Path(quantized), unpacked, entries, parameter_sources(unpacked), packed_forms(config))
    return Pair(StoredWeights(plain.folder, plain.config, plain.entries, plain.sources), stored,
                _is_folded(quantized, reference))


def _is_folded(quantized: Path, reference: Path) -> bool:
    """From quantization.json; a checkpoint without it is compared as it lies there. VL2Error for another's child."""
    path = quantized / DESCRIPTION_NAME
    if not path.is_file():
        return False
    facts = read_json(path)
    if "converted" in facts:
        return False
    made_from = facts["source"]["files"]
    for name, digest in checkpoint_source(reference).files.items():
        if made_from.get(name, digest) != digest:
            raise VL2Error(f"{quantized} was made from {facts['source']['name']}, whose {name} differs from that of "
                           f"{reference}", "give the checkpoint that the quantized one was made from")
    return method_named(facts["method"]).folds

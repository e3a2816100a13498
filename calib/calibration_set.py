"""The calibration set: a folder of merged embeddings with the account of where they come from.

    CALIB/
      calibration.json           CalibrationSet
      embeddings.safetensors     hidden float32 [tokens, H], modality uint8 (0 text, 1 image), sequence, position int32
      vision_{i}.safetensors     statistics of the Linears of tower block i (see `statistics.Moments`)
      projector.safetensors      the same for the projector

All sequences lie one after another. `hidden` is float32, so that a run over it starts from what the model itself sees.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from torch import Tensor

from vl2 import __version__
from vl2.calib.data import DataOptions
from vl2.calib.tensor_file import read_tensor
from vl2.checkpoint_name import checkpoint_name
from vl2.errors import VL2Error
from vl2.file_hashes import HashCache
from vl2.json_file import from_json, read_json, to_json
from vl2.manifest import Source
from vl2.safetensors_file import TensorEntry, checkpoint_entries, read_header

SCHEMA_VERSION = 1
DESCRIPTION_NAME, EMBEDDINGS_NAME = "calibration.json", "embeddings.safetensors"


@dataclass(frozen=True)
class DataFacts:
    """As in `data.CalibrationData`; bad_rows is their number."""

    format: str
    path: str | None
    sha256: str
    rows: int
    bad_rows: int
    ignored: tuple[str, ...]
    left_out: int
    options: DataOptions


@dataclass(frozen=True)
class SequenceFacts:
    """One conversation; image_sha256 of its images' pixels, so that an evaluation can refuse to reuse them."""

    source: str
    tokens: int
    image_tokens: int
    is_answered: bool
    image_sha256: tuple[str, ...]


@dataclass(frozen=True)
class CalibrationSet:
    """calibration.json. source: the checkpoint and the sha256 of the files that the embeddings follow from."""

    schema_version: int
    vl2_version: str
    source: Source
    data: DataFacts
    sequences: tuple[SequenceFacts, ...]
    text_tokens: int
    image_tokens: int
    hidden_size: int

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.image_tokens

    def spans(self) -> Iterator[tuple[int, int]]:
        """First and behind-the-last row of each sequence."""
        ends = list(accumulate(sequence.tokens for sequence in self.sequences))
        return zip([0, *ends[:-1]], ends, strict=True)


def read_calibration_set(folder: Path) -> CalibrationSet:
    """Reads calibration.json and checks that the embeddings are as it says; VL2Error names what does not agree."""
    path = folder / DESCRIPTION_NAME
    values = read_json(path)
    if values.get("schema_version") != SCHEMA_VERSION:
        raise VL2Error(f"{path} has schema_version {values.get('schema_version')!r}, expected {SCHEMA_VERSION}",
                       "calibrate again with this version of vl2")
    found = from_json(CalibrationSet, values, DESCRIPTION_NAME)
    shape = embedding_entries(folder)["hidden"].shape
    if shape != (found.tokens, found.hidden_size) or sum(s.tokens for s in found.sequences) != found.tokens:
        raise VL2Error(f"{folder / EMBEDDINGS_NAME} holds {list(shape)} numbers, {path} tells of "
                       f"{[found.tokens, found.hidden_size]}", "calibrate again")
    return found


def write_description(folder: Path, description: CalibrationSet) -> None:
    """Writes calibration.json into a folder that has no reader yet."""
    (folder / DESCRIPTION_NAME).write_text(json.dumps(to_json(description), indent=1) + "\n", encoding="utf-8")


def embedding_entries(folder: Path) -> dict[str, TensorEntry]:
    """Where hidden, modality, sequence and position lie."""
    path = folder / EMBEDDINGS_NAME
    if not path.is_file():
        raise VL2Error(f"{path} is missing", "give a folder that `vl2 calibrate` made")
    return read_header(path)


def read_modality(folder: Path) -> Tensor:
    """uint8 [tokens]: 0 text, 1 image."""
    return read_tensor(embedding_entries(folder)["modality"])


def checkpoint_source(folder: Path) -> Source:
    """Name of the folder and sha256 of the files that embeddings follow from, remembered for big files."""
    names = {"config.json", "processor_config.json", "tokenizer.json"}
    names |= {entry.path.name for entry in checkpoint_entries(folder).values()}
    cache = HashCache()
    files = {name: cache.sha256_of(folder / name) for name in sorted(names)}
    cache.save()
    return Source(checkpoint_name(folder), files)


def check_source(description: CalibrationSet, checkpoint: Path) -> None:
    """Raises VL2Error unless the calibration set was made from this checkpoint."""
    for name, digest in checkpoint_source(checkpoint).files.items():
        if description.source.files.get(name) != digest:
            raise VL2Error(f"the calibration set was made from {description.source.name}, whose {name} differs from "
                           f"that of {checkpoint}", "calibrate with the checkpoint that is to be quantized")


def new_description(source: Source, data: DataFacts, sequences: tuple[SequenceFacts, ...], hidden_size: int
                    ) -> CalibrationSet:
    """A description with the counts summed up."""
    images = sum(sequence.image_tokens for sequence in sequences)
    texts = sum(sequence.tokens for sequence in sequences) - images
    return CalibrationSet(SCHEMA_VERSION, __version__, source, data, sequences, texts, images, hidden_size)

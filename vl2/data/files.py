"""Which reader a data file gets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from vl2.data.jsonl import read_jsonl
from vl2.data.llava_json import read_llava
from vl2.data.sample import Row
from vl2.data.vlmevalkit_tsv import read_vlmevalkit
from vl2.errors import VL2Error

# Suffix of a file → name of its format and reader.
FORMATS: dict[str, tuple[str, Callable[[Path], Iterator[Row]]]] = {
    ".jsonl": ("JSON lines", read_jsonl),
    ".json": ("LLaVA JSON", read_llava),
    ".tsv": ("VLMEvalKit TSV", read_vlmevalkit),
}


def open_rows(path: Path) -> tuple[str, Iterator[Row]]:
    """Name of the format and the rows of a data file. Raises VL2Error when it is missing or of no known format."""
    if not path.is_file():
        raise VL2Error(f"{path}: no such file", f"give a file ending in {', '.join(FORMATS)}")
    if path.suffix.lower() not in FORMATS:
        kinds = ", ".join(f"{suffix} ({name})" for suffix, (name, _) in FORMATS.items())
        raise VL2Error(f"{path}: the ending {path.suffix!r} is unknown", f"expected {kinds}")
    name, read = FORMATS[path.suffix.lower()]
    return name, read(path)


def image_sha256(image: Image.Image) -> str:
    """Of width, height and RGB pixels: equal for the same picture as PNG, as base64 and in memory."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.convert("RGB").tobytes()).hexdigest()

"""Calibration data: a folder of images, each asked the same question. Nothing is known of the answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from vl2.data.sample import Ignored, Row, question_sample


def read_image_folder(folder: Path, prompt: str) -> Iterator[Row]:
    """A sample for each file below `folder` whose suffix Pillow knows, in the order of their paths."""
    known = Image.registered_extensions()
    ignored = set()
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        suffix = path.suffix.lower()
        if suffix in known:
            yield question_sample(str(path), prompt, (path,), (), {})
        elif suffix not in ignored:
            ignored.add(suffix)
            yield Ignored(f"files ending in {suffix!r}" if suffix else "files without an ending")

"""Token embeddings by memory map: only the rows that a prompt uses are read from disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vl2.errors import VL2Error
from vl2.manifest import Manifest
from vl2.safetensors_file import read_header

_STORED = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class Embeddings:
    """The embedding table and the two learnt image vectors, all given as float32.

    image_newline, view_seperator (sic): [H].
    """

    def __init__(self, folder: Path, manifest: Manifest):
        path = folder / manifest.embeddings.file
        entries = read_header(path)
        language = manifest.language
        shapes = {"embed_tokens": (language.vocab_size, language.hidden_size),
                  "image_newline": (language.hidden_size,), "view_seperator": (language.hidden_size,)}
        self._maps = {name: _memory_map(path, entries.get(name), name, shape) for name, shape in shapes.items()}
        self._dtype = entries["embed_tokens"].dtype
        self.image_newline = _widen(self._maps["image_newline"], entries["image_newline"].dtype)
        self.view_seperator = _widen(self._maps["view_seperator"], entries["view_seperator"].dtype)

    def lookup(self, ids: np.ndarray) -> np.ndarray:
        """float32 [T, H] rows of token ids int64 [T]."""
        return _widen(self._maps["embed_tokens"][ids], self._dtype)


def _memory_map(path: Path, entry, name: str, shape: tuple[int, ...]) -> np.ndarray:
    remedy = "export the bundle again"
    if entry is None:
        raise VL2Error(f"{path} has no tensor {name!r}", remedy)
    if entry.shape != shape or entry.dtype not in _STORED:
        raise VL2Error(f"{path}: {name} is {entry.dtype} {list(entry.shape)}, "
                       f"expected {list(shape)} in {', '.join(_STORED)}", remedy)
    # As a plain array: indexing the subclass costs ten times as much.
    return np.memmap(path, _STORED[entry.dtype], "r", entry.offset, shape).view(np.ndarray)


def _widen(stored: np.ndarray, dtype: str) -> np.ndarray:
    """float32 copy; bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)

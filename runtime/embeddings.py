"""Token embeddings by memory map: only the rows that a prompt uses are read from disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vl2.errors import VL2Error
from vl2.manifest import SCALES_SUFFIX, Manifest
from vl2.safetensors_file import read_header

_STORED = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_CODES = {"I8": np.int8}
_TABLE = "embed_tokens"
_REMEDY = "export the bundle again"


class Embeddings:
    """The embedding table and the two learnt image vectors, all given as float32.

    image_newline, view_seperator (sic): [H].
    """

    def __init__(self, folder: Path, manifest: Manifest):
        path = folder / manifest.embeddings.file
        entries = read_header(path)
        language = manifest.language
        shapes = {_TABLE: (language.vocab_size, language.hidden_size),
                  "image_newline": (language.hidden_size,), "view_seperator": (language.hidden_size,)}
        packed = _TABLE in entries and entries[_TABLE].dtype in _CODES
        if packed:
            shapes[_TABLE + SCALES_SUFFIX] = _scales_shape(entries.get(_TABLE + SCALES_SUFFIX), shapes[_TABLE], path)
        self._maps = {name: _memory_map(path, entries.get(name), name, shape,
                                        _CODES if packed and name == _TABLE else _STORED)
                      for name, shape in shapes.items()}
        self._dtypes = {name: entries[name].dtype for name in shapes}
        self.image_newline = _widen(self._maps["image_newline"], self._dtypes["image_newline"])
        self.view_seperator = _widen(self._maps["view_seperator"], self._dtypes["view_seperator"])

    def lookup(self, ids: np.ndarray) -> np.ndarray:
        """float32 [T, H] rows of token ids int64 [T]."""
        rows = _widen(self._maps[_TABLE][ids], self._dtypes[_TABLE])
        if _TABLE + SCALES_SUFFIX not in self._maps:
            return rows
        scales = _widen(self._maps[_TABLE + SCALES_SUFFIX][ids], self._dtypes[_TABLE + SCALES_SUFFIX])
        return (rows.reshape(*scales.shape, -1) * scales[..., None]).reshape(rows.shape)


def _scales_shape(entry, table: tuple[int, ...], path: Path) -> tuple[int, ...]:
    """[V, G] where the columns of the table fall into G equal groups."""
    rows, columns = table
    if entry is None or len(entry.shape) != 2 or entry.shape[1] < 1 or columns % entry.shape[1]:
        found = "missing" if entry is None else list(entry.shape)
        raise VL2Error(f"{path}: {_TABLE + SCALES_SUFFIX} is {found}, expected [{rows}, groups of {columns} columns]",
                       _REMEDY)
    return rows, entry.shape[1]


def _memory_map(path: Path, entry, name: str, shape: tuple[int, ...], stored: dict[str, type]) -> np.ndarray:
    if entry is None:
        raise VL2Error(f"{path} has no tensor {name!r}", _REMEDY)
    if entry.shape != shape or entry.dtype not in stored:
        raise VL2Error(f"{path}: {name} is {entry.dtype} {list(entry.shape)}, "
                       f"expected {list(shape)} in {', '.join(stored)}", _REMEDY)
    # As a plain array: indexing the subclass costs ten times as much.
    return np.memmap(path, stored[entry.dtype], "r", entry.offset, shape).view(np.ndarray)


def _widen(stored: np.ndarray, dtype: str) -> np.ndarray:
    """float32 copy; bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)

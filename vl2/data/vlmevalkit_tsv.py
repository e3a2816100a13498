"""Data: VLMEvalKit's TSV (quantization guide, section 4.4).

Columns: index, image (base64, a list literal of several, or the index of the row that holds the image) or image_path,
question, answer (text or a list literal of several), hint, and A, B, C … for choices.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import io
import string
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from vl2.data.sample import BadRow, EncodedImage, Ignored, ImageSource, Row, fault_of_texts, question_sample
from vl2.errors import VL2Error

_IMAGES = {"image", "image_path"}
_READ = {"index", "question", "answer", "hint", *_IMAGES}
_LONGEST_REFERENCE = 64  # characters; a longer image cell is base64, a shorter one the index of another row
_LONGEST_CELL = 256 << 20


class _BadCell(ValueError):
    """Why a row gives no sample."""


class _TableRow(NamedTuple):
    """A row: its first line, its byte offset, its cells that are not empty, and its fault, if it has one."""

    line: int
    offset: int
    cells: dict[str, str]
    fault: str = ""


def read_vlmevalkit(path: Path) -> Iterator[Row]:
    """One sample or bad row for each row of the table.

    Raises VL2Error when the columns that every row needs are missing.
    """
    offsets = {row.cells.get("index", ""): row.offset for row in _iter_rows(path)
               if len(row.cells.get("image", "")) > _LONGEST_REFERENCE}
    ignored: set[str] = set()
    for row in _iter_rows(path):
        source = f"{path}:{row.line}"
        names = {name for name in row.cells if name not in _READ and name not in string.ascii_uppercase}
        yield from (Ignored(f"column {name!r}") for name in sorted(names - ignored))
        ignored |= names
        try:
            images = _images(row, path, offsets)
            answers = _items(row.cells["answer"]) if "answer" in row.cells else []
            facts = {name: cell for name, cell in row.cells.items() if name not in _IMAGES}
            yield question_sample(source, _question(row.cells), images, answers, facts)
        except _BadCell as error:
            yield BadRow(source, str(error))


def _iter_rows(path: Path, start: int | None = None) -> Iterator[_TableRow]:
    """All rows, or those from byte `start` on (whose line numbers mean nothing)."""
    csv.field_size_limit(_LONGEST_CELL)  # the module's own limit is below the size of an image
    with path.open("rb") as file:
        lines = _Lines(file, path)
        names = next(csv.reader(lines, delimiter="\t"), [])
        if "question" not in names or not {"image", "image_path"} & set(names):
            raise VL2Error(f"{path} has the columns {', '.join(names)[:200]}",
                           "expected a first row that names question, and image or image_path, separated by tabs")
        if start is not None:
            lines.seek(start)
        rows = csv.reader(lines, delimiter="\t", strict=True)
        while True:
            line, offset, fault = lines.number + 1, lines.offset, ""
            try:
                values = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                values, fault = ["fault"], f"no row of a table: {error}"
            if len(values) > len(names):
                fault = f"has {len(values)} cells, the first row names {len(names)} columns"
            cells = {} if fault else {name: cell for name, cell in zip(names, values, strict=False) if cell.strip()}
            if values:
                yield _TableRow(line, offset, cells, fault)


class _Lines:
    """The lines of a file as text, with the number of lines read and the offset of the next."""

    def __init__(self, file: io.BufferedReader, path: Path):
        self._file, self._path = file, path
        self.number, self.offset = 0, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.number, self.offset = self.number + 1, self.offset + len(line)
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            where = f"{self._path}:{self.number}"
            raise VL2Error(f"{where} is not text in UTF-8: {error}", "convert the file to UTF-8") from error

    def seek(self, offset: int) -> None:
        self._file.seek(offset)
        self.offset = offset


def _images(row: _TableRow, path: Path, offsets: dict[str, int]) -> list[ImageSource]:
    if row.fault:
        raise _BadCell(row.fault)
    if "image_path" in row.cells:
        return [path.parent / name for name in _items(row.cells["image_path"])]
    cell = row.cells.get("image", "")
    if not cell:
        raise _BadCell("has neither image nor image_path")
    if len(cell) <= _LONGEST_REFERENCE:
        if cell not in offsets:
            raise _BadCell(f"its image is {cell!r}: too short for base64, and no row of this index holds an image")
        cell = next(_iter_rows(path, offsets[cell])).cells["image"]
    return [_decode_image(item) for item in _items(cell)]


def _decode_image(text: str) -> EncodedImage:
    """The image of base64 text, of which only the header is looked at."""
    try:
        image = EncodedImage(base64.b64decode(text, validate=True))
        image.open()
        return image
    except binascii.Error as error:
        raise _BadCell(f"the image is not base64: {error}") from error
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise _BadCell(f"the base64 holds no image that Pillow can read ({error})") from error


def _question(cells: dict[str, str]) -> str:
    if "question" not in cells:
        raise _BadCell("has no question")
    choices = [f"{letter}. {cells[letter]}" for letter in string.ascii_uppercase if letter in cells]
    return "\n".join([*([cells["hint"]] if "hint" in cells else []), cells["question"], *choices])


def _items(cell: str) -> list[str]:
    """The cell, or the items of a Python list literal, in which an escape may write what is no character."""
    if not cell.startswith("["):
        return [cell]
    try:
        items = ast.literal_eval(cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return [cell]
    if not isinstance(items, list) or not items:
        return [cell]
    texts = [str(item) for item in items]
    if fault := fault_of_texts(texts):
        raise _BadCell(fault)
    return texts


"""Dense labels for the tower: which glyph or shape lies on each patch and in each image token, and its word's box."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vl2.image import pad_geometry
from vl2.nano.documents import Document
from vl2.nano.geometry import CELL, CELLS, PATCH, TILE
from vl2.nano.pages import COLOURS, KINDS

BLANK = 0
SLOTS = 3  # glyphs told apart in one image token
_FIRST_SHAPE = 95
CLASSES = _FIRST_SHAPE + len(KINDS) * len(COLOURS)


@dataclass(frozen=True)
class TileLabels:
    """For the local tiles of one document, in tile order (row by row).

    patches: uint8 [n, (S/patch)²] class at each patch's centre; slots: uint8 [n, h², SLOTS] classes of the glyphs
    centred in each image token; boxes: float16 [n, h², 4] the box of the first glyph's word relative to the token's
    centre in half tiles, NaN where the token is blank. places: float16 [h·th, h·tw, 4] the same box over the whole map
    of image tokens, in shares of the image's sides, as answers give it.
    """

    patches: np.ndarray
    slots: np.ndarray
    boxes: np.ndarray
    places: np.ndarray


def class_of(label: str | tuple[str, str]) -> int:
    """Class of a printable ASCII character (1 to 94) or of a (kind, colour) shape (95 up)."""
    if isinstance(label, str):
        return ord(label) - 32
    return _FIRST_SHAPE + KINDS.index(label[0]) * len(COLOURS) + list(COLOURS).index(label[1])


def tile_labels(document: Document) -> TileLabels:
    """Labels of a document's local tiles."""
    wide, high = document.crop
    width, height, dx, dy = pad_geometry(document.image.size, (TILE * wide, TILE * high))
    scale = np.array([width / document.image.width, height / document.image.height] * 2)
    shift = np.array([dx, dy, dx, dy])
    side = TILE // PATCH
    patches = np.zeros((side * high, side * wide), np.uint8)
    slots = np.zeros((CELLS * high, CELLS * wide, SLOTS), np.uint8)
    boxes = np.full((CELLS * high, CELLS * wide, 4), np.nan, np.float16)
    places = boxes.copy()
    sides = np.array(document.image.size * 2)
    for mark in document.marks:
        box = np.array(mark.box) * scale + shift
        label = class_of(mark.label)
        x0, y0, x1, y1 = np.ceil(box / PATCH - 0.5).astype(int)
        patches[max(y0, 0):y1, max(x0, 0):x1] = label
        column, row = int((box[0] + box[2]) / 2 // CELL), int((box[1] + box[3]) / 2 // CELL)
        if not (0 <= row < CELLS * high and 0 <= column < CELLS * wide):
            continue
        taken = int((slots[row, column] > 0).sum())
        if taken < SLOTS:
            slots[row, column, taken] = label
        if taken == 0:
            outer = np.array(document.words[mark.word].box if mark.word >= 0 else mark.box)
            centre = (np.array([column, row, column, row]) + 0.5) * CELL
            boxes[row, column] = np.clip((outer * scale + shift - centre) / (TILE / 2), -3, 3)
            places[row, column] = np.clip(outer / sides, 0, 1)
    cut = (_cut(patches, side, high, wide), _cut(slots, CELLS, high, wide), _cut(boxes, CELLS, high, wide))
    return TileLabels(*cut, places)


def _cut(grid: np.ndarray, side: int, high: int, wide: int) -> np.ndarray:
    """[high·side, wide·side, …] → [tiles, side², …], tiles row by row."""
    rest = grid.shape[2:]
    tiles = grid.reshape(high, side, wide, side, *rest).swapaxes(1, 2)
    return np.ascontiguousarray(tiles.reshape(high * wide, side * side, *rest))

"""Where on the page each answer token is read: targets that teach some attention heads to point.

Without them the decoder sits on a long plateau at which it ignores the image; with them it begins to read at once.
"""

from __future__ import annotations

import re

import numpy as np

from vl2.image import image_token_count, pad_geometry
from vl2.nano.documents import Document
from vl2.nano.geometry import CELL, CELLS, GEOMETRY, TILE
from vl2.nano.questions import Question

NOWHERE = -1
_SPOKEN = re.compile(r"[^\s<>|]+")
_COORDINATES = re.compile(r"\[\[(\d+), (\d+), (\d+), (\d+)\]\]")


def mark_cells(document: Document) -> np.ndarray:
    """int64 [marks, 2]: (row, column) of the image token, in the local map, that holds each mark's centre."""
    wide, high = document.crop
    width, height, dx, dy = pad_geometry(document.image.size, (TILE * wide, TILE * high))
    boxes = np.array([mark.box for mark in document.marks], float).reshape(-1, 4)
    x = (boxes[:, 0] + boxes[:, 2]) / 2 * width / document.image.width + dx
    y = (boxes[:, 1] + boxes[:, 3]) / 2 * height / document.image.height + dy
    rows = np.clip(y // CELL, 0, CELLS * high - 1)
    columns = np.clip(x // CELL, 0, CELLS * wide - 1)
    return np.stack([rows, columns], 1).astype(np.int64)


def block_positions(document: Document) -> np.ndarray:
    """int64 [marks]: index within the image block of the local image token under each mark."""
    cells, wide = mark_cells(document), document.crop[0]
    local = cells[:, 0] * (CELLS * wide + 1) + cells[:, 1]
    return image_token_count((1, 1), GEOMETRY) - CELLS * (CELLS + 1) + local


def character_targets(document: Document, question: Question, positions: np.ndarray) -> list[int]:
    """For every character of the answer the block position where it is to be read, or NOWHERE."""
    answer = question.answer
    targets = [NOWHERE] * len(answer)
    if question.task == "grounding":
        _point_at_corners(document, question, positions, targets)
    elif question.task == "colour":
        kinds = [i for i, mark in enumerate(document.marks) if mark.label[0] in question.question]
        targets = [int(positions[kinds[0]])] * len(answer) if len(kinds) == 1 else targets
    elif question.task != "count":
        start = _unique_run(document, answer)
        if start is not None:
            spoken = [i for i, character in enumerate(answer) if not character.isspace()]
            for offset, i in enumerate(spoken):
                targets[i] = int(positions[start + offset])
    return targets


def subject_targets(document: Document, question: Question, positions: np.ndarray) -> list[int]:
    """For every character of the question the block position of the page's word (or shape) it speaks of, or NOWHERE.

    Words count where the page has them once, in whatever case and with or without a colon.
    """
    targets = [NOWHERE] * len(question.question)
    on_page: dict[str, list[list[int]]] = {}
    for index, word in enumerate(document.words):
        glyphs = [i for i, mark in enumerate(document.marks) if mark.word == index]
        on_page.setdefault(word.text.lower().rstrip(":"), []).append(glyphs)
    for i, mark in enumerate(document.marks):
        if isinstance(mark.label, tuple):
            on_page.setdefault(mark.label[0], []).append([i])
    for match in _SPOKEN.finditer(question.question.lower()):
        spoken = match.group().rstrip("?.")
        found = on_page.get(spoken, [])
        if len(found) == 1:
            glyphs = found[0]
            for offset in range(len(spoken)):
                targets[match.start() + offset] = int(positions[glyphs[min(offset, len(glyphs) - 1)]])
    return targets


def _unique_run(document: Document, answer: str) -> int | None:
    """Index of the first mark of the only run of whole words that spells `answer`; None if there is not exactly one."""
    labels = [mark.label if isinstance(mark.label, str) else "\0" for mark in document.marks]
    text, wanted = "".join(labels), "".join(answer.split())
    if not wanted:
        return None
    words = [mark.word for mark in document.marks]
    found = []
    start = text.find(wanted)
    while start >= 0:
        stop = start + len(wanted)
        opens = start == 0 or words[start - 1] != words[start]
        closes = stop == len(text) or words[stop] != words[stop - 1]
        found += [start] if opens and closes else []
        start = text.find(wanted, start + 1)
    return found[0] if len(found) == 1 else None


def _point_at_corners(document: Document, question: Question, positions: np.ndarray, targets: list[int]) -> None:
    """The left and upper coordinates are read at the word's first glyph, the right and lower ones at its last."""
    subject = question.answer.split("<|/ref|>")[0].removeprefix("<|ref|>")
    first = _unique_run(document, subject)
    if first is not None:
        last = first + len(subject) - 1
    else:
        labels = [" ".join(reversed(m.label)) if isinstance(m.label, tuple) else "" for m in document.marks]
        shapes = [i for i, label in enumerate(labels) if label and (label == subject or label.endswith(" " + subject))]
        if len(shapes) != 1:
            return
        first = last = shapes[0]
    match = _COORDINATES.search(question.answer)
    for group, mark in enumerate((first, first, last, last), 1):
        for i in range(*match.span(group)):
            targets[i] = int(positions[mark])

"""Boxes in an answer: `<|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2], …]<|/det|>` (spec section 12).

Numbers are parsed, never evaluated. Where the original gives up on the whole answer, what is well formed is kept and
the rest is reported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vl2.special_tokens import DET_CLOSE, DET_OPEN, REF_CLOSE, REF_OPEN

_FULL_SCALE = 999
_SPAN = {
    "ref": re.compile(re.escape(REF_OPEN) + "(.*?)" + re.escape(REF_CLOSE)),
    "det": re.compile(re.escape(DET_OPEN) + "(.*?)" + re.escape(DET_CLOSE)),
}
_MARK = re.compile("|".join(map(re.escape, (REF_OPEN, REF_CLOSE, DET_OPEN, DET_CLOSE))))
_NUMBER = re.compile(r"\s*[-+]?\d{1,9}(\.\d{0,9})?\s*")
_COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 160, 0), (255, 0, 255), (0, 200, 200))
_LINE_WIDTH = 3

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Box:
    """A labelled box; corners in 0…999 of the original image's width and height, as the model wrote them."""

    label: str
    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def corners(self) -> Corners:
        """(x1, y1, x2, y2)."""
        return self.x1, self.y1, self.x2, self.y2

    def pixels(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(x1, y1, x2, y2) in pixels of an image of `size`, truncated; 999 is one past the last pixel (spec 12)."""
        width, height = size
        return (int(self.x1 / _FULL_SCALE * width), int(self.y1 / _FULL_SCALE * height),
                int(self.x2 / _FULL_SCALE * width), int(self.y2 / _FULL_SCALE * height))

    def to_dict(self, size: tuple[int, int] | None = None) -> dict[str, Any]:
        """For JSON; `pixels` where the image's size is known."""
        facts = {"label": self.label, "box": [self.x1, self.y1, self.x2, self.y2]}
        return facts if size is None else {**facts, "pixels": list(self.pixels(size))}


@dataclass(frozen=True)
class Grounding:
    """The boxes of a text, and what of it could not be read, each with its reason."""

    boxes: tuple[Box, ...]
    problems: tuple[str, ...]


def intersection_over_union(a: Corners, b: Corners) -> float:
    """Of two boxes (x1, y1, x2, y2); 0 for a box without area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def parse(text: str) -> Grounding:
    """All boxes of a text; labels and lists of boxes pair up in order where their numbers agree, else if adjacent."""
    refs, dets = (list(pattern.finditer(text)) for pattern in _SPAN.values())
    problems = _stray_marks(text, refs + dets)
    pairs = list(zip(refs, dets, strict=True)) if len(refs) == len(dets) else _neighbours(refs, dets, problems)
    boxes = []
    for ref, det in pairs:
        found, reasons = _parse_boxes(det[1])
        boxes += [Box(ref[1], *corners) for corners in found]
        reasons += [f"{list(corners)} leaves 0…{_FULL_SCALE}" for corners in found
                    if not all(0 <= corner <= _FULL_SCALE for corner in corners)]
        problems += [f"boxes of {ref[1]!r}: {reason}" for reason in reasons]
    return Grounding(tuple(boxes), tuple(problems))


def _stray_marks(text: str, spans: list[re.Match]) -> list[str]:
    """Marks outside every span: not closed, not opened, or with a line break between."""
    covered = sorted(span.span() for span in spans)
    stray = [mark for mark in _MARK.finditer(text)
             if not any(start <= mark.start() < end for start, end in covered)]
    return [f"{mark[0]} at character {mark.start()} has no partner on its line" for mark in stray]


def _neighbours(refs: list[re.Match], dets: list[re.Match], problems: list[str]) -> list[tuple[re.Match, re.Match]]:
    """Each box list with the label right before it; labels and lists left alone are added to `problems`."""
    pairs, waiting = [], None
    for span in sorted(refs + dets, key=re.Match.start):
        if span.re is _SPAN["det"] and waiting is not None:
            pairs.append((waiting, span))
            waiting = None
            continue
        if waiting is not None:
            problems.append(f"label {waiting[1]!r} has no boxes")
        if span.re is _SPAN["ref"]:
            waiting = span
        else:
            waiting = None
            problems.append(f"boxes {span[1]!r} have no label")
    if waiting is not None:
        problems.append(f"label {waiting[1]!r} has no boxes")
    return pairs


def _parse_boxes(content: str) -> tuple[list[tuple[float, ...]], list[str]]:
    """(corners, reasons) of what stands between the det marks: a list of boxes in brackets."""
    stripped = content.strip()
    if not (stripped.startswith("[") and stripped.endswith("]") and len(stripped) > 1):
        return [], [f"{content!r} is not a list in brackets"]
    boxes, reasons = [], []
    inner = stripped[1:-1]
    for piece in re.finditer(r"\[([^\[\]]*)\]", inner):
        corners = piece[1].split(",")
        if len(corners) != 4:
            reasons.append(f"{piece[0]!r} has {len(corners)} numbers, expected 4")
        elif not all(map(_NUMBER.fullmatch, corners)):
            reasons.append(f"{piece[0]!r} holds something else than numbers")
        else:
            boxes.append(tuple(_number(corner) for corner in corners))
    rest = re.sub(r"\[[^\[\]]*\]", "", inner).replace(",", "").strip()
    if rest:
        reasons.append(f"{rest!r} stands outside of boxes")
    return boxes, reasons


def _number(text: str) -> float:
    return float(text) if "." in text else int(text)


def draw(image: Image.Image, boxes: tuple[Box, ...] | list[Box]) -> Image.Image:
    """A copy of the image in RGB with each box outlined and its label above it, or inside where there is no room."""
    canvas = image.convert("RGB")
    pen = ImageDraw.Draw(canvas)
    size = max(12, min(canvas.size) // 40)
    font = ImageFont.load_default(size)
    for index, box in enumerate(boxes):
        x1, y1, x2, y2 = _near(box.pixels(canvas.size), canvas.size)
        colour = _COLOURS[index % len(_COLOURS)]
        # A model may write the corners the other way round; Pillow would refuse them.
        pen.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=colour, width=_LINE_WIDTH)
        top = min(y1, y2)
        above = top - size - _LINE_WIDTH - 2
        pen.text((min(x1, x2), above if above >= 0 else top + _LINE_WIDTH), box.label, fill=colour, font=font)
    return canvas


def _near(corners: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Corners no further than a line's width outside of `size`, since Pillow goes over all pixels of an outline."""
    sides = (*size, *size)
    return tuple(min(max(corner, -_LINE_WIDTH), side + _LINE_WIDTH)
                 for corner, side in zip(corners, sides, strict=True))

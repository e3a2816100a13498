"""One synthetic page: drawing text and shapes while recording where everything is, then rotation, blur and noise.

Layout is in canvas pixels, the pixels the model sees after fitting the image into its tiles; `Page.unit` converts to
pixels of the image, so that text keeps a legible size whatever the image's own size.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vl2.errors import VL2Error
from vl2.image import best_resolution
from vl2.nano.geometry import CANDIDATES, TILE

Box = tuple[float, float, float, float]

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "builtin")  # builtin: Pillow's own
COLOURS = {
    "red": (214, 39, 40), "green": (34, 150, 60), "blue": (40, 80, 210), "yellow": (235, 205, 30),
    "purple": (140, 60, 180), "orange": (250, 135, 20), "black": (25, 25, 25), "white": (250, 250, 250),
}
KINDS = ("circle", "square", "triangle", "star")
SMALLEST_SCALE = 0.85  # image pixels over canvas pixels; text drawn smaller blurs when it is enlarged
MARGIN = 5  # canvas pixels; also bounds how far rotation may move a corner


@dataclass
class Mark:
    """A drawn glyph or shape: label (character, or (kind, colour)), box in image pixels, index of its word or −1."""

    label: str | tuple[str, str]
    box: Box
    word: int = -1


@dataclass
class Word:
    """A blank-free run of glyphs and its ink box in image pixels."""

    text: str
    box: Box


@functools.cache
def font_folder() -> Path:
    """matplotlib's fonts, found without importing it; VL2Error when it is not installed."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise VL2Error("matplotlib is not installed; its DejaVu fonts draw the documents",
                       "pip install '.[export]' in vl2's folder")
    return Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"


@functools.lru_cache(maxsize=2000)
def load_font(name: str, size: float) -> ImageFont.FreeTypeFont:
    if name == "builtin":
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(font_folder() / f"{name}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


@dataclass
class Page:
    """A page under construction. width, height: canvas pixels the content occupies; unit: image pixels each."""

    rng: Random
    crop: tuple[int, int]
    size: tuple[int, int]
    unit: float
    image: Image.Image
    background: tuple[int, int, int]
    ink: tuple[int, int, int]
    font_name: str
    marks: list[Mark] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)

    @property
    def width(self) -> float:
        return self.size[0] / self.unit

    @property
    def height(self) -> float:
        return self.size[1] / self.unit

    @functools.cached_property
    def draw(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.image)

    def font(self, size: float) -> ImageFont.FreeTypeFont:
        """The page's font at `size` canvas pixels."""
        return load_font(self.font_name, round(size * self.unit * 2) / 2)

    def text_width(self, text: str, size: float) -> float:
        return self.font(size).getlength(text) / self.unit

    def text(self, position: tuple[float, float], text: str, size: float, right: bool = False) -> Box:
        """Draws `text` with its baseline starting (or, `right`, ending) at `position`; records glyphs and words.

        Returns the ink box in image pixels.
        """
        font = self.font(size)
        x, y = position[0] * self.unit, position[1] * self.unit
        if right:
            x -= font.getlength(text)
        x, y = round(x), round(y)
        self.draw.text((x, y), text, font=font, fill=self.ink, anchor="ls")
        top = y - 0.75 * size * self.unit
        start = 0
        for part in text.split(" "):
            if part:
                left = x + font.getlength(text[:start])
                ink = font.getbbox(part, anchor="ls")
                self.words.append(Word(part, (left + ink[0], y + ink[1], left + ink[2], y + ink[3])))
                for character in part:
                    right_edge = left + font.getlength(character)
                    self.marks.append(Mark(character, (left, top, right_edge, y), len(self.words) - 1))
                    left = right_edge
            start += len(part) + 1
        ink = font.getbbox(text, anchor="ls")
        return x + ink[0], y + ink[1], x + ink[2], y + ink[3]

    def line(self, start: tuple[float, float], stop: tuple[float, float], width: float = 1.0) -> None:
        points = [value * self.unit for value in (*start, *stop)]
        self.draw.line(points, fill=self.ink, width=max(1, round(width * self.unit)))

    def rectangle(self, box: Box, colour: tuple[int, int, int]) -> None:
        self.draw.rectangle([round(value * self.unit) for value in box], fill=colour)

    def shape(self, kind: str, colour: str, centre: tuple[float, float], radius: float) -> None:
        """Draws a filled shape inside a square of side 2·radius and records it."""
        cx, cy, r = (value * self.unit for value in (*centre, radius))
        fill = jitter(self.rng, COLOURS[colour], 14)
        if kind == "circle":
            self.draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)
            box = (cx - r, cy - r, cx + r, cy + r)
        else:
            points = [(cx + r * px, cy + r * py) for px, py in _outline(kind)]
            self.draw.polygon(points, fill=fill)
            xs, ys = zip(*points, strict=True)
            box = (min(xs), min(ys), max(xs), max(ys))
        self.marks.append(Mark((kind, colour), box))


def _outline(kind: str) -> list[tuple[float, float]]:
    if kind == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if kind == "triangle":
        return [(0, -1), (0.95, 0.8), (-0.95, 0.8)]
    turns = [(math.pi * (0.2 * i - 0.5), 1.0 if i % 2 == 0 else 0.42) for i in range(10)]
    return [(r * math.cos(a), r * math.sin(a)) for a, r in turns]


def jitter(rng: Random, colour: tuple[int, int, int], amount: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour)
    return red, green, blue


def image_size(rng: Random, crop: tuple[int, int], largest_scale: float = 1.4) -> tuple[int, int]:
    """An image size whose best resolution is `crop` tiles, seldom filling its canvas.

    It is SMALLEST_SCALE to `largest_scale` times the canvas.
    """
    canvas = TILE * crop[0], TILE * crop[1]
    while True:
        scale = math.exp(rng.uniform(math.log(SMALLEST_SCALE), math.log(largest_scale)))
        shrink = [1.0, rng.uniform(0.8, 1.0)]
        rng.shuffle(shrink)
        size = round(canvas[0] * scale * shrink[0]), round(canvas[1] * scale * shrink[1])
        if best_resolution(size, CANDIDATES) == canvas:
            return size


def new_page(rng: Random, crop: tuple[int, int], size: tuple[int, int] | None = None, inverted: float = 0.12) -> Page:
    """An empty page with random size, colours and font; `inverted` is the share of light-on-dark pages."""
    size = size or image_size(rng, crop)
    unit = 1 / min(TILE * crop[0] / size[0], TILE * crop[1] / size[1])
    light = jitter(rng, (rng.randint(205, 250),) * 3, 12)
    dark = jitter(rng, (rng.randint(10, 80),) * 3, 25)
    if rng.random() < inverted:
        light, dark = dark, light
    image = Image.new("RGB", size, light)
    return Page(rng, crop, size, unit, image, light, dark, rng.choice(FONTS))


def finish(page: Page, disturb: float = 1.0) -> None:
    """Rotates the page by up to 3 degrees, blurs it and adds noise, each at random; boxes follow the rotation.

    `disturb` scales the probabilities; 0 leaves the page clean.
    """
    rng = page.rng
    if rng.random() < 0.2 * disturb:
        reach = max(page.width, page.height) / 2
        _rotate(page, rng.uniform(-1, 1) * min(3.0, math.degrees((MARGIN - 1) / reach)))
    if rng.random() < 0.2 * disturb:
        page.image = page.image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.4) * page.unit))
    if rng.random() < 0.35 * disturb:
        pixels = np.asarray(page.image, np.float32) + noise(rng, page.size[::-1]) * rng.uniform(2, 7)
        page.image = Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))


@functools.cache
def _noise_bank() -> np.ndarray:
    """One million normal deviates; slices of them are the noise of all pages (drawing fresh ones costs more time)."""
    return np.random.default_rng(0).standard_normal(1 << 20, np.float32)


def noise(rng: Random, size: tuple[int, int]) -> np.ndarray:
    """float32 [*size, 3] normal deviates."""
    count = size[0] * size[1] * 3
    start = rng.randrange((1 << 20) - 1)
    return np.resize(np.roll(_noise_bank(), -start) if count > (1 << 20) - start else _noise_bank()[start:], (*size, 3))


def _rotate(page: Page, degrees: float) -> None:
    page.image = page.image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=page.background)
    sin, cos = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    cx, cy = page.size[0] / 2, page.size[1] / 2

    def turned(box: Box) -> Box:
        corners = [(x - cx, y - cy) for x in (box[0], box[2]) for y in (box[1], box[3])]
        xs = [cx + x * cos + y * sin for x, y in corners]
        ys = [cy - x * sin + y * cos for x, y in corners]
        return max(min(xs), 0.0), max(min(ys), 0.0), min(max(xs), page.size[0]), min(max(ys), page.size[1])

    for item in (*page.marks, *page.words):
        item.box = turned(item.box)

"""What goes into the decoder for a laid-out prompt, and by what values two prompts are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from vl2.image import image_tiles, image_token_count
from vl2.prompt import Layout
from vl2.runtime.engine import Engine
from vl2.runtime.image_features import assemble_image, encode_tiles

# Hashed at once: a few rows, so that no second copy of a large image is made.
_STRIP_PIXELS = 1 << 20


@dataclass(eq=False)
class ImageSpan:
    """An image of a prompt, its tiles (tw, th) and its positions start … end - 1. image: None once it was let go."""

    image: Image.Image | None
    crop: np.ndarray
    start: int
    end: int

    @cached_property
    def digest(self) -> bytes:
        """sha256 of pixels, size and crop."""
        facts = np.array([*self.image.size, *self.crop], np.int64).tobytes()
        digest = hashlib.sha256(facts)
        for strip in _strips(self.image):
            digest.update(strip.tobytes())
        return digest.digest()


class PromptInputs:
    """A laid-out prompt with its images; their vectors come from the engine's image cache where it has them.

    encoded: images for which the vision graph has run.
    """

    def __init__(self, engine: Engine, layout: Layout):
        self._engine, self._input_ids = engine, layout.input_ids
        self.images = _image_spans(engine, layout)
        self.encoded = 0
        self._vectors: dict[bytes, np.ndarray] = {}

    @cached_property
    def contents(self) -> np.ndarray:
        """int64 [T]: token ids, and for the positions of an image a negative number made from its pixels and crop."""
        contents = self._input_ids.copy()
        for span in self.images:
            contents[span.start:span.end] = -1 - (int.from_bytes(span.digest[:8], "little") >> 1)
        return contents

    def needs_vision(self, start: int) -> bool:
        """Whether `embeds(start)` runs the vision graph; what the cache has is held from here on."""
        missing = False
        for span in self.images:
            if span.end > start and span.digest not in self._vectors:
                found = self._engine.image_cache.get(self._key(span))
                missing |= found is None
                if found is not None:
                    self._vectors[span.digest] = found
        return missing

    def embeds(self, start: int, between: Callable[[], None] = lambda: None) -> np.ndarray:
        """float32 [T - start, H] from position `start` on; images that end before it are not even cut.

        between: called before each part of the work, may raise.
        """
        self.needs_vision(start)
        embeds = self._engine.embeddings.lookup(self._input_ids[start:])
        for span in self.images:
            if span.end > start:
                vectors = self._vectors_of(span, between)
                embeds[max(span.start - start, 0):span.end - start] = vectors[max(start - span.start, 0):]
        self._vectors.clear()
        return embeds

    def let_go(self) -> None:
        """Frees the pixels, 4 bytes each, which nothing needs once `contents` and `embeds` were made from them."""
        for span in self.images:
            span.image = None

    def _vectors_of(self, span: ImageSpan, between: Callable[[], None]) -> np.ndarray:
        if span.digest not in self._vectors:
            self._vectors[span.digest] = self._encode(span, between)
            self.encoded += 1
        return self._vectors[span.digest]

    def _encode(self, span: ImageSpan, between: Callable[[], None]) -> np.ndarray:
        engine, geometry = self._engine, self._engine.processor.geometry
        between()
        tiles = image_tiles(span.image, span.crop, geometry)
        hidden = engine.manifest.language.hidden_size
        features = encode_tiles(engine.backend, tiles, geometry, hidden, between)
        vectors = assemble_image(features, span.crop, engine.embeddings, engine.manifest.image.global_view_pos)
        engine.image_cache.put(self._key(span), vectors)
        return vectors

    def _key(self, span: ImageSpan) -> bytes:
        return hashlib.sha256(self._engine.identity + span.digest).digest()


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def contents_of(layout: Layout, engine: Engine) -> np.ndarray:
    """As PromptInputs.contents."""
    return PromptInputs(engine, layout).contents


def embed(engine: Engine, layout: Layout, start: int) -> np.ndarray:
    """As PromptInputs.embeds."""
    return PromptInputs(engine, layout).embeds(start)


def _image_spans(engine: Engine, layout: Layout) -> tuple[ImageSpan, ...]:
    positions = np.flatnonzero(layout.images_seq_mask)
    counts = [image_token_count(crop, engine.processor.geometry) for crop in layout.crops]
    firsts = np.cumsum([0, *counts])
    assert firsts[-1] == len(positions), "an image has as many positions as vectors"
    starts = [int(positions[first]) for first in firsts[:-1]]
    return tuple(ImageSpan(image, crop, start, start + count)
                 for image, crop, start, count in zip(layout.images, layout.crops, starts, counts, strict=True))

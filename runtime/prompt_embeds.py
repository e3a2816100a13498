"""What goes into the decoder for a laid-out prompt, and by what values two prompts are compared."""

from __future__ import annotations

import hashlib

import numpy as np

from vl2.image import image_tiles, image_token_count
from vl2.prompt import Layout
from vl2.runtime.engine import Engine
from vl2.runtime.image_features import assemble_image, encode_tiles


def contents_of(layout: Layout, engine: Engine) -> np.ndarray:
    """int64 [T]: token ids, and for the positions of an image a negative number made from its pixels and crop."""
    contents = layout.input_ids.copy()
    for image, crop, (start, end) in zip(layout.images, layout.crops, image_spans(layout, engine), strict=True):
        digest = hashlib.sha256(np.array([*image.size, *crop], np.int64).tobytes() + image.tobytes()).digest()
        contents[start:end] = -1 - (int.from_bytes(digest[:8], "little") >> 1)
    return contents


def image_spans(layout: Layout, engine: Engine) -> list[tuple[int, int]]:
    """[start, end) of each image's positions, in order."""
    positions = np.flatnonzero(layout.images_seq_mask)
    counts = [image_token_count(crop, engine.processor.geometry) for crop in layout.crops]
    firsts = np.cumsum([0, *counts])
    assert firsts[-1] == len(positions), "an image has as many positions as vectors"
    return [(int(positions[first]), int(positions[first]) + count)
            for first, count in zip(firsts[:-1], counts, strict=True)]


def embed(engine: Engine, layout: Layout, start: int) -> np.ndarray:
    """float32 [T - start, H] from position `start` on; images that end before it are not even cut."""
    embeds = engine.embeddings.lookup(layout.input_ids[start:])
    geometry = engine.processor.geometry
    for image, crop, (first, end) in zip(layout.images, layout.crops, image_spans(layout, engine), strict=True):
        if end <= start:
            continue
        features = encode_tiles(engine.backend, image_tiles(image, crop, geometry), geometry, embeds.shape[1])
        vectors = assemble_image(features, crop, engine.embeddings, engine.manifest.image.global_view_pos)
        embeds[max(first - start, 0):end - start] = vectors[max(start - first, 0):]
    return embeds

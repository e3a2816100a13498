"""From tiles to the vectors that stand at an image's prompt positions (spec section 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vl2.image import ImageGeometry
from vl2.runtime.backend import Backend
from vl2.runtime.embeddings import Embeddings

# Attention over a tile's patches takes patches² memory; batching more than this gains nothing on a CPU.
_PATCHES_PER_RUN = 1024


def encode_tiles(
    backend: Backend, tiles: np.ndarray, geometry: ImageGeometry, hidden_size: int,
    between: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """float32 [N, h·h, H] features of tiles float32 [N, 3, S, S], as many at a time as the backend takes, a few where
    it does not say; `between` is called before each."""
    patches = (geometry.tile_size // geometry.patch_size) ** 2
    step = backend.limits.tiles or max(1, _PATCHES_PER_RUN // patches)
    features = np.empty((len(tiles), geometry.tokens_per_side ** 2, hidden_size), np.float32)
    for start in range(0, len(tiles), step):
        between()
        part = slice(start, start + step)
        backend.run("vision", {"tiles": tiles[part]}, {"image_features": features[part]})
    return features


def assemble_image(
    features: np.ndarray, crop: Sequence[int], embeddings: Embeddings, global_view_pos: str
) -> np.ndarray:
    """float32 [tokens, H]: global view, separator, local view (or the reverse order), each row ended by image_newline.

    features: [1 + tw·th, h·h, H], the global tile first; crop: (tw, th).
    """
    tiles_wide, tiles_high = (int(count) for count in crop)
    count, tokens, hidden = features.shape
    side = round(tokens ** 0.5)
    assert count == 1 + tiles_wide * tiles_high, "one global tile and tw·th local ones"
    grid = features[1:].reshape(tiles_high, tiles_wide, side, side, hidden).transpose(0, 2, 1, 3, 4)
    whole = _end_rows(features[0].reshape(side, side, hidden), embeddings.image_newline)
    local = _end_rows(grid.reshape(tiles_high * side, tiles_wide * side, hidden), embeddings.image_newline)
    separator = embeddings.view_seperator[None]
    parts = (whole, separator, local) if global_view_pos == "head" else (local, separator, whole)
    return np.concatenate(parts)


def _end_rows(view: np.ndarray, newline: np.ndarray) -> np.ndarray:
    """[rows·(columns + 1), H] of a view [rows, columns, H]."""
    rows, columns, hidden = view.shape
    ended = np.empty((rows, columns + 1, hidden), np.float32)
    ended[:, :columns] = view
    ended[:, columns] = newline
    return ended.reshape(-1, hidden)

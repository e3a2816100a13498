import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl2.image import ImageGeometry, image_token_count
from vl2.runtime.backend import Backend
from vl2.runtime.image_features import assemble_image, encode_tiles

HIDDEN = 3


class Stored:
    """The two learnt vectors."""

    image_newline = np.full(HIDDEN, -1, np.float32)
    view_seperator = np.full(HIDDEN, -2, np.float32)


def word_by_word(features: np.ndarray, crop: tuple[int, int], side: int, head: bool) -> np.ndarray:
    """Spec section 7, vector by vector."""
    tiles_wide, tiles_high = crop
    whole, local = [], []
    for row in range(side):
        whole += [features[0, row * side + column] for column in range(side)] + [Stored.image_newline]
    for row in range(tiles_high * side):
        for column in range(tiles_wide * side):
            tile = 1 + (row // side) * tiles_wide + column // side
            local.append(features[tile, (row % side) * side + column % side])
        local.append(Stored.image_newline)
    parts = [whole, [Stored.view_seperator], local] if head else [local, [Stored.view_seperator], whole]
    return np.stack([vector for part in parts for vector in part])


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_an_image_is_assembled_as_the_specification_says(wide: int, high: int, side: int, head: bool) -> None:
    features = np.random.default_rng(0).normal(size=(1 + wide * high, side * side, HIDDEN)).astype(np.float32)
    vectors = assemble_image(features, (wide, high), Stored(), "head" if head else "tail")
    np.testing.assert_array_equal(vectors, word_by_word(features, (wide, high), side, head))
    geometry = ImageGeometry(side * 2, 1, 2, ((side * 2, side * 2),))
    assert len(vectors) == image_token_count((wide, high), geometry)


@pytest.mark.parametrize("tile, patch, largest", [(384, 14, 1), (32, 4, 16), (64, 2, 1)])
def test_tiles_are_encoded_a_few_at_a_time_and_come_back_in_order(tile: int, patch: int, largest: int) -> None:
    geometry = ImageGeometry(tile, patch, 2, ((tile, tile),))
    sizes = []

    class Tower(Backend):
        def run(self, graph, feeds, results):
            assert graph == "vision"
            sizes.append(len(feeds["tiles"]))
            results["image_features"][:] = feeds["tiles"][:, 0, 0, 0][:, None, None]

    tiles = np.zeros((19, 3, tile, tile), np.float32)
    tiles[:, 0, 0, 0] = np.arange(19)
    features = encode_tiles(Tower(), tiles, geometry, HIDDEN)
    assert features.shape == (19, geometry.tokens_per_side ** 2, HIDDEN)
    assert features[:, 0, 0].tolist() == list(range(19))
    assert max(sizes) == largest

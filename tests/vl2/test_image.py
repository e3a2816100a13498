import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vl2.errors import VL2Error
from vl2.image import (
    ImageGeometry,
    best_resolution,
    image_crops,
    image_token_count,
    load_image,
    pad_geometry,
    preprocess,
)

GOLDENS = Path(__file__).parents[1] / "goldens"
CANDIDATES = tuple(map(tuple, json.loads((GOLDENS / "published" / "processor_config.json").read_text())
                       ["candidate_resolutions"]))
PUBLISHED = ImageGeometry(384, 14, 2, CANDIDATES)
SMALL = ImageGeometry(32, 4, 2, ((32, 32), (64, 32), (32, 64), (64, 64)))
PIXELS = json.loads((GOLDENS / "processor" / "pixels_index.json").read_text())["images"]


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("name", PIXELS)
def test_tiles_equal_the_originals_to_the_last_bit(name: str) -> None:
    facts = PIXELS[name]
    image = Image.open(GOLDENS / facts["file"])
    for tiling, mode in ((True, "crop"), (False, "nocrop")):
        expected = facts[mode]
        result = preprocess([image], PUBLISHED, tiling=tiling)
        assert result.tiles.dtype == np.float32
        assert result.crops.tolist() == [expected["tiles_wh"]]
        assert image_token_count(result.crops[0], PUBLISHED) == expected["num_image_tokens"]
        assert [sha256(tile) for tile in result.tiles] == expected["tile_f32_chw_sha256"]


@pytest.mark.parametrize("name", PIXELS)
def test_conversion_to_rgb_equals_the_original(name: str) -> None:
    facts = PIXELS[name]
    rgb = load_image(GOLDENS / facts["file"])
    assert list(rgb.size) == facts["size_wh"]
    assert hashlib.sha256(rgb.tobytes()).hexdigest() == facts["rgb_after_convert_sha256"]


def test_best_resolution_agrees_with_the_recorded_table() -> None:
    for width, height, best_width, best_height in json.loads(
            (GOLDENS / "processor" / "best_resolution.json").read_text())["rows"]:
        assert best_resolution((width, height), CANDIDATES) == (best_width, best_height), (width, height)


def test_pad_geometry_agrees_with_the_recorded_table() -> None:
    for row in json.loads((GOLDENS / "processor" / "pad_geometry.json").read_text())["rows"]:
        size, target, expected = row[:2], row[2:4], tuple(row[4:])
        if min(expected[:2]) < 1:
            with pytest.raises(VL2Error, match="too thin"):
                pad_geometry(size, target)
        else:
            assert pad_geometry(size, target) == expected, row


def slow_best_resolution(size, candidates):
    """Spec 3.3 word by word, with its strict comparisons."""
    best, best_effective, least_wasted = None, 0, float("inf")
    for width, height in candidates:
        scale = min(width / size[0], height / size[1])
        effective = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        wasted = width * height - effective
        if effective > best_effective or (effective == best_effective and wasted < least_wasted):
            best, best_effective, least_wasted = (width, height), effective, wasted
    return best


@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)))
def test_best_resolution_equals_the_word_by_word_search(size: tuple[int, int]) -> None:
    assert best_resolution(size, CANDIDATES) == slow_best_resolution(size, CANDIDATES)


@given(st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_a_small_geometry_gives_whole_tiles_for_every_size(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (255, 0, 0))
    try:
        result = preprocess([image], SMALL)
    except VL2Error as error:
        assert "too thin" in error.message
        return
    tiles_wide, tiles_high = result.crops[0]
    assert result.tiles.shape == (1 + tiles_wide * tiles_high, 3, 32, 32)
    assert result.tiles.min() >= -1 and result.tiles.max() <= 1


def test_padding_is_the_grey_of_127() -> None:
    tiles = preprocess([Image.new("RGB", (32, 8))], SMALL, tiling=False).tiles
    assert tiles[0, 0, 0, 0] == np.float32((np.float32(127) / np.float32(255) - 0.5) / 0.5)
    assert tiles[0, 0, 16, 16] == -1


def test_three_images_switch_tiling_off_for_all() -> None:
    image = Image.new("RGB", (64, 64))
    assert preprocess([image] * 2, SMALL).crops.tolist() == [[2, 2]] * 2
    assert preprocess([image] * 3, SMALL).crops.tolist() == [[1, 1]] * 3


def test_no_image_gives_no_tile() -> None:
    result = preprocess([], SMALL)
    assert result.tiles.shape == (0, 3, 32, 32) and result.crops.shape == (0, 2)


@pytest.mark.parametrize("crop, tokens", [((1, 1), 421), ((2, 1), 617), ((1, 2), 631), ((2, 2), 1023), ((3, 3), 2017),
                                          ((9, 1), 1989), ((1, 9), 2101)])
def test_token_counts_are_those_of_the_specification(crop: tuple[int, int], tokens: int) -> None:
    assert image_token_count(crop, PUBLISHED) == tokens


@pytest.mark.parametrize("size", [(1, 1000), (2000, 2)])
def test_an_image_too_thin_to_show_is_refused_with_its_size(size: tuple[int, int]) -> None:
    with pytest.raises(VL2Error, match=f"{size[0]}x{size[1]} pixels is too thin") as error:
        preprocess([Image.new("RGB", size)], PUBLISHED)
    assert error.value.hint


def png_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((60, 60), 90).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kept", [10, 40, 1000])
def test_a_truncated_image_is_refused_with_its_name(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "half.png"
    path.write_bytes(png_bytes()[:kept])
    with pytest.raises(VL2Error, match="half.png") as error:
        load_image(path)
    assert error.value.hint


@given(st.binary(max_size=200), st.integers(0, 3000))
def test_any_damage_gives_an_image_or_a_clear_error(tmp_path_factory, noise: bytes, position: int) -> None:
    content = bytearray(png_bytes())
    content[position:position + len(noise)] = noise
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(content)
    try:
        load_image(path)
    except VL2Error as error:
        assert "damaged.png" in error.message


def test_a_missing_image_a_folder_and_a_text_file_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("no image")
    for path, message in ((tmp_path / "none.png", "no such image file"), (tmp_path, "is a folder"),
                          (tmp_path / "note.png", "not an image that Pillow can read")):
        with pytest.raises(VL2Error, match=message):
            load_image(path)


def test_whatever_a_reader_of_pillow_raises_is_an_error_of_the_user(tmp_path: Path, monkeypatch) -> None:
    def decode(image: Image.Image) -> None:
        raise RuntimeError("Failed to decode image: Missing or empty image item")

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(VL2Error, match="a.png: the image is broken or truncated .Failed to decode"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_eight_bits_are_refused_and_not_clipped(mode: str) -> None:
    with pytest.raises(VL2Error, match="more than 8 bits"):
        load_image(Image.new(mode, (4, 4)))


def test_a_closed_image_is_an_error_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes())
    image = Image.open(path)
    image.close()
    with pytest.raises(VL2Error, match="the given image"):
        load_image(image)


@pytest.mark.parametrize("geometry", [dict(tile_size=0), dict(patch_size=0), dict(candidate_resolutions=((33, 32),)),
                                      dict(candidate_resolutions=((0, 32),))])
def test_an_impossible_geometry_is_refused(geometry: dict) -> None:
    facts = dict(tile_size=32, patch_size=4, downsample_ratio=2, candidate_resolutions=((32, 32),)) | geometry
    with pytest.raises(VL2Error, match="expected at least 1|not made of whole tiles"):
        ImageGeometry(**facts)


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 9))
def test_a_tile_budget_chooses_by_the_originals_rule_among_fewer(width: int, height: int, limit: int) -> None:
    crop = image_crops([(width, height)], PUBLISHED.with_max_tiles(limit))[0]
    assert crop.prod() <= limit
    whole = image_crops([(width, height)], PUBLISHED)[0]
    if whole.prod() <= limit:
        assert crop.tolist() == whole.tolist()


def test_without_a_tile_budget_and_with_the_largest_nothing_changes() -> None:
    assert PUBLISHED.with_max_tiles(None) is PUBLISHED
    assert PUBLISHED.with_max_tiles(9) == PUBLISHED


def test_a_tile_budget_below_every_resolution_is_refused() -> None:
    with pytest.raises(VL2Error, match="max_tiles is 1, the smallest image of this model has 2"):
        ImageGeometry(32, 4, 2, ((32, 64), (64, 64))).with_max_tiles(1)

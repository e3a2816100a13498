"""Images to normalised tiles, bit for bit as the original processor (spec section 3), under every Pillow version.

Parity decides what users may find surprising: EXIF orientation is ignored and alpha is dropped, not composited.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from vl2.errors import VL2Error

# With three or more images in the whole conversation each one is shown at a single tile (spec 3.2).
MAX_TILED_IMAGES = 2

_DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class ImageGeometry:
    """How a checkpoint cuts images; lengths in pixels, resolutions as (width, height)."""

    tile_size: int
    patch_size: int
    downsample_ratio: int
    candidate_resolutions: tuple[tuple[int, int], ...]
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        for name in ("tile_size", "patch_size", "downsample_ratio"):
            if getattr(self, name) < 1:
                raise VL2Error(f"image geometry: {name} is {getattr(self, name)}, expected at least 1")
        for resolution in self.candidate_resolutions:
            if any(side < 1 or side % self.tile_size for side in resolution):
                raise VL2Error(
                    f"candidate resolution {resolution} is not made of whole tiles of {self.tile_size} pixels",
                    "the tile side is the width of the first candidate resolution; mend processor_config.json",
                )

    @property
    def tokens_per_side(self) -> int:
        """Rows (and columns) of image tokens one tile gives: ceil(floor(tile/patch)/downsample)."""
        return math.ceil(self.tile_size // self.patch_size / self.downsample_ratio)

    def with_max_tiles(self, limit: int | None) -> ImageGeometry:
        """The same without the resolutions of more than `limit` tiles; the global view comes on top. None: unchanged.

        Raises VL2Error when no resolution is left.
        """
        if limit is None:
            return self
        kept = tuple(size for size in self.candidate_resolutions if self._tiles_of(size) <= limit)
        if not kept:
            fewest = min(map(self._tiles_of, self.candidate_resolutions))
            raise VL2Error(f"max_tiles is {limit}, the smallest image of this model has {fewest}",
                           f"allow {fewest} or more tiles an image")
        return replace(self, candidate_resolutions=kept)

    def _tiles_of(self, resolution: tuple[int, int]) -> int:
        return (resolution[0] // self.tile_size) * (resolution[1] // self.tile_size)


@dataclass(frozen=True)
class ImageTiles:
    """tiles: float32 [N, 3, S, S], per image the global view, then its local tiles row by row;
    crops: int64 [n, 2], local tiles of each image as (tw, th)."""

    tiles: np.ndarray
    crops: np.ndarray


def load_image(source: str | os.PathLike | Image.Image) -> Image.Image:
    """An RGB image from a path or a Pillow image.

    Raises VL2Error for a file that is missing, broken or truncated, and for more than 8 bits a channel,
    which Pillow would clip to white.
    """
    name = "the given image" if isinstance(source, Image.Image) else os.fspath(source)
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, name)
        with Image.open(source) as opened:
            return _to_rgb(opened, name)
    except VL2Error:
        raise
    except FileNotFoundError as error:
        raise VL2Error(f"{name}: no such image file", "give the path of an image") from error
    except IsADirectoryError as error:
        raise VL2Error(f"{name} is a folder, expected an image file", "give the path of one image") from error
    except Image.UnidentifiedImageError as error:
        raise VL2Error(f"{name}: not an image that Pillow can read", "convert it to PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise VL2Error(f"{name}: {error}", "scale the image down; the model sees at most nine tiles") from error
    except Exception as error:  # Pillow's readers raise nearly anything for broken files
        raise VL2Error(f"{name}: the image is broken or truncated ({error})", "fetch or save it again") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith(_DEEP_MODES):
        raise VL2Error(
            f"{name}: mode {image.mode} has more than 8 bits a channel, expected at most 8",
            "scale its values to 0..255 and save it as 8-bit PNG",
        )
    if image.width < 1 or image.height < 1:
        raise VL2Error(f"{name}: size {image.width}x{image.height}, expected at least 1x1")
    image.load()
    # converting RGB to RGB would copy it
    return image if image.mode == "RGB" else image.convert("RGB")


def best_resolution(size: tuple[int, int], candidates: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The candidate (width, height) that keeps most of an image of `size`, then wastes least, then comes first.

    Source: spec 3.3; ties as its strict comparisons leave them.
    """
    width, height = size

    def rank(candidate: tuple[int, int]) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - candidate[0] * candidate[1]

    return max(candidates, key=rank)


def pad_geometry(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """(new width, new height, x, y): the size an image of `size` is resized to and its place on a `target` canvas.

    Source: spec 3.4. Raises VL2Error for an image so thin that a side rounds to 0.
    """
    (width, height), (target_width, target_height) = size, target
    new_width, new_height = target
    if width / height > target_width / target_height:
        new_height = round(height / width * target_width)
    elif width / height < target_width / target_height:
        new_width = round(width / height * target_height)
    if new_width < 1 or new_height < 1:
        raise VL2Error(
            f"an image of {width}x{height} pixels is too thin: fitted into {target_width}x{target_height} "
            f"it becomes {new_width}x{new_height}, expected sides of at least 1",
            "cut it into pieces that are less elongated",
        )
    # At most one side falls short of the target; round() is half-to-even as in the original.
    return new_width, new_height, round((target_width - new_width) * 0.5), round((target_height - new_height) * 0.5)


def image_token_count(crop: tuple[int, int], geometry: ImageGeometry) -> int:
    """Prompt positions of one image of `crop` = (tw, th) local tiles: n(n+1) + 1 + n·th·(n·tw + 1) (spec 3)."""
    tiles_wide, tiles_high = (int(count) for count in crop)
    side = geometry.tokens_per_side
    return side * (side + 1) + 1 + side * tiles_high * (side * tiles_wide + 1)


def image_crops(
    sizes: Sequence[tuple[int, int]], geometry: ImageGeometry, tiling: bool | None = None
) -> np.ndarray:
    """int64 [n, 2]: how many local tiles (tw, th) each image of one conversation gets, from the images' sizes.

    `tiling` cuts each image at its best resolution; by default on for at most two images, as the original does.
    """
    side = geometry.tile_size
    crops = np.ones((len(sizes), 2), np.int64)
    if len(sizes) <= MAX_TILED_IMAGES if tiling is None else tiling:
        for index, size in enumerate(sizes):
            width, height = best_resolution(size, geometry.candidate_resolutions)
            crops[index] = width // side, height // side
    return crops


def image_tiles(image: Image.Image, crop: Sequence[int], geometry: ImageGeometry) -> np.ndarray:
    """float32 [1 + tw·th, 3, S, S]: the global view of an RGB image, then its local tiles row by row."""
    side = geometry.tile_size
    target = int(crop[0]) * side, int(crop[1]) * side
    return np.concatenate([_cut(image, (side, side), geometry), _cut(image, target, geometry)])


def preprocess(images: Sequence[Image.Image], geometry: ImageGeometry, tiling: bool | None = None) -> ImageTiles:
    """Tiles of all images of one conversation; `tiling` as for `image_crops`.

    Raises VL2Error as `load_image` and `pad_geometry` do.
    """
    rgb = [load_image(image) for image in images]
    crops = image_crops([image.size for image in rgb], geometry, tiling)
    none = np.empty((0, 3, geometry.tile_size, geometry.tile_size), np.float32)
    parts = [image_tiles(image, crop, geometry) for image, crop in zip(rgb, crops, strict=True)]
    return ImageTiles(np.concatenate([none, *parts]), crops)


def _cut(image: Image.Image, target: tuple[int, int], geometry: ImageGeometry) -> np.ndarray:
    """The image fitted into `target` (width, height), cut into normalised tiles float32 [th·tw, 3, S, S]."""
    side = geometry.tile_size
    pixels = np.asarray(_fit_and_pad(image, target, geometry.image_mean))
    grid = pixels.reshape(target[1] // side, side, target[0] // side, side, 3)
    tiles = grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    normalised = np.empty(tiles.shape, np.float32)
    for channel, (mean, std) in enumerate(zip(geometry.image_mean, geometry.image_std, strict=True)):
        table = (levels - np.float32(mean)) / np.float32(std)
        np.take(table, tiles[:, channel], out=normalised[:, channel])
    return normalised


def _fit_and_pad(image: Image.Image, target: tuple[int, int], mean: tuple[float, ...]) -> Image.Image:
    width, height, x, y = pad_geometry(image.size, target)
    # Two calls fix the order of the passes: Pillow 13 would resize some tall images vertically first.
    resized = image.resize((width, image.height), Image.Resampling.BICUBIC)
    resized = resized.resize((width, height), Image.Resampling.BICUBIC)
    if resized.size == target:
        return resized
    canvas = Image.new("RGB", target, tuple(int(value * 255) for value in mean))
    canvas.paste(resized, (x, y))
    return canvas

"""Images of a request: their header is judged on arrival, their pixels are decoded right before they are needed."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from vl2.errors import VL2Error
from vl2.image import ImageGeometry, pad_geometry
from vl2.runtime.serve.api_error import ApiError, refused

# Pillow opens many more, some of them by starting other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_ANIMATED = ("PNG", "WEBP", "GIF")
# Each scan of a progressive JPEG goes over all pixels, and takes a few bytes; photographs have about ten.
_SCAN, _MOST_SCANS = b"\xff\xda", 100


def check_images(encoded: Sequence[bytes], most_pixels: int, geometry: ImageGeometry) -> int:
    """The pixels of all together, from the headers alone.

    Raises ApiError 400 for other formats, animations, too many pixels, and images that are too thin.
    """
    pixels = 0
    for index, content in enumerate(encoded):
        width, height = _size(content, f"image {index + 1}")
        pixels += width * height
        if pixels > most_pixels:
            raise ApiError(400, f"image {index + 1} has {width}x{height} pixels; all images of a request may have "
                           f"{most_pixels:,} together", "messages")
        try:
            # The global view is the smallest target, so that what fits there fits everywhere.
            pad_geometry((width, height), (geometry.tile_size, geometry.tile_size))
        except VL2Error as error:
            raise refused(error, "messages") from error
    return pixels


class Encoded(Sequence[Image.Image]):
    """Images that `check_images` let through, each decoded anew when it is taken: who takes them holds the pixels."""

    def __init__(self, encoded: Sequence[bytes]):
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> Image.Image:
        return decode(self._encoded[index])


def decode(content: bytes) -> Image.Image:
    """An image with its pixels as they are stored. Raises ApiError 400 for broken ones."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        image.load()
    except Exception as error:  # Pillow's readers raise nearly anything for hostile bytes
        raise _unreadable("an image", error) from error
    return image


def _size(content: bytes, name: str) -> tuple[int, int]:
    if not content:
        raise ApiError(400, f"{name} has zero bytes", "messages")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            size, animated = image.size, image.format in _ANIMATED and getattr(image, "is_animated", False)
    except Exception as error:  # as in decode
        raise _unreadable(name, error) from error
    if content.startswith(b"\xff\xd8") and content.count(_SCAN) > _MOST_SCANS:
        raise ApiError(400, f"{name} is a JPEG of more than {_MOST_SCANS} scans", "messages")
    if animated:
        raise ApiError(400, f"{name} is animated, expected one picture (send the frame that is meant)", "messages")
    return size


def _unreadable(name: str, error: Exception) -> ApiError:
    reason = "unknown or broken" if isinstance(error, Image.UnidentifiedImageError) else str(error)[:200]
    return ApiError(400, f"{name} cannot be read: {reason} (expected a whole {', '.join(FORMATS)})", "messages")

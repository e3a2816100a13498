"""Image URLs of a request → bytes, from where the settings allow it and nowhere else."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from vl2.runtime.serve.api_error import ApiError
from vl2.runtime.serve.remote import Fetch
from vl2.runtime.serve.settings import ServeSettings

_DATA = re.compile(r"data:([a-z]+/[a-z0-9.+-]+)?(;[a-z0-9=._-]+)*;base64,", re.IGNORECASE)


def image_bytes(url: str, settings: ServeSettings, fetch: Fetch) -> bytes:
    """The encoded image behind `url`. Blocks while it is fetched. Raises ApiError."""
    scheme = url[:8].split(":", 1)[0].lower() if ":" in url[:8] else ""
    if scheme == "data":
        return _from_data(url)
    if scheme == "https":
        if not settings.image_hosts:
            raise _not_allowed("images are not fetched by this server", "--allow-remote-images HOST")
        return fetch(url)
    if scheme == "http":
        raise ApiError(400, "images are fetched by https only", "messages")
    if settings.image_root is None:
        raise _not_allowed("local files are not read by this server", "--image-root DIR")
    return _from_file(url, scheme, settings.image_root, settings.limits.body_bytes)


def _not_allowed(what: str, option: str) -> ApiError:
    return ApiError(400, f"{what} (send a data URL, or start it with {option})", "messages")


def _from_data(url: str) -> bytes:
    head = _DATA.match(url[:256])
    if head is None:
        raise ApiError(400, f"the image URL begins {url[:40]!r}, expected `data:image/…;base64,`", "messages")
    try:
        # Line breaks are what some encoders put in; anything else that is not base64 is an error.
        return base64.b64decode(re.sub(r"\s", "", url[head.end():]), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"the data URL is no base64: {error}", "messages") from error


def _from_file(url: str, scheme: str, root: Path, limit: int) -> bytes:
    """A regular file that, with all links followed, lies below `root`; all else gets one answer, that tells nothing."""
    missing = ApiError(400, "the image URL is no data or https URL and no file below the image root", "messages")
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise missing
        url = unquote(parts.path)
    folder = root.resolve()
    try:
        path = (folder / url).resolve()
        if not path.is_relative_to(folder):
            raise missing
        file = _open_regular(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise missing from error
    if file is None:
        raise missing
    with file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ApiError(413, f"the image file has {size:,} bytes, expected at most {limit:,}", "messages")
        return file.read(limit)


def _open_regular(path: Path) -> BinaryIO | None:
    """The file, if it is a regular one: neither a link put there since it was looked up nor a pipe that would block."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    return None

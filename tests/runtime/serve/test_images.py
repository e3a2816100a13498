"""Where images may come from, and what hostile ones get."""

import io
import os
import struct
import weakref
import zlib
from pathlib import Path

import pytest
from PIL import Image

from tests.runtime.serve.conftest import data_url, png, question
from vl2.runtime.serve.api_error import ApiError
from vl2.runtime.serve.image_bytes import image_bytes
from vl2.runtime.serve.images import Encoded
from vl2.runtime.serve.settings import ServeSettings


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of few bytes whose header claims these sides: what a decompression bomb looks like."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


FRAMES = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
RED = Image.new("RGB", (40, 30), "red")
EXIF = Image.Exif()
EXIF[0x0112] = 6  # turn by 90 degrees
GOOD = {
    "CMYK": (saved(Image.new("CMYK", (40, 30), (0, 99, 99, 0)), "JPEG"), [40, 30]),
    "EXIF rotation, which is ignored": (saved(RED, "JPEG", exif=EXIF.tobytes()), [40, 30]),
    "palette with transparency": (saved(RED.convert("P"), "PNG", transparency=0), [40, 30]),
    "one bit": (saved(RED.convert("1"), "PNG"), [40, 30]),
    "alpha": (saved(RED.convert("RGBA"), "WEBP"), [40, 30]),
    "still GIF": (saved(RED, "GIF"), [40, 30]),
    "BMP": (saved(RED, "BMP"), [40, 30]),
}
BAD = {
    "bomb": (png_claiming(60_000, 60_000), "60000x60000|cannot be read"),
    "bomb that Pillow would open": (png_claiming(8_000, 8_000), "8000x8000 pixels"),
    "1x10000": (png((1, 10_000)), "too thin"),
    "10000x1": (png((10_000, 1)), "too thin"),
    "animated GIF": (saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "animated"),
    "animated PNG": (saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "animated"),
    "16 bits": (saved(Image.new("I;16", (40, 30), 4000), "PNG"), "more than 8 bits"),
    "truncated": (png((200, 200))[:-60], "broken or truncated|cannot be read"),
    "lies about its size": (png_claiming(100, 100), "broken or truncated|cannot be read"),
    "zero bytes": (b"", "zero bytes"),
    "text": (b"hello", "unknown or broken"),
    "PDF": (b"%PDF-1.4", "unknown or broken"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown or broken"),
    "TIFF": (saved(RED, "TIFF"), "unknown or broken"),
    "JPEG of 101 scans": (saved(RED, "JPEG") + b"\xff\xda" * 100, "more than 100 scans"),
    "header only": (b"\x89PNG\r\n\x1a\n", "unknown or broken"),
}


@pytest.mark.parametrize("name", GOOD)
def test_unusual_images_are_answered(served, name: str) -> None:
    content, size = GOOD[name]
    done = served().ask(question("What?", data_url(content)))
    assert done.status_code == 200, done.text
    assert done.json()["choices"][0]["image_size"] == size


@pytest.mark.parametrize("name", BAD)
def test_hostile_images_get_a_clear_refusal(served, name: str) -> None:
    content, reason = BAD[name]
    done = served().ask(question("What?", data_url(content)))
    assert done.status_code == 400, done.text
    error = done.json()["error"]
    assert error["param"] == "messages"
    assert any(part in error["message"] for part in reason.split("|")), error


def test_an_image_is_decoded_when_it_is_taken_and_held_by_nobody_else() -> None:
    encoded = Encoded([png((30, 20)), saved(RED.convert("L"), "PNG")])
    assert len(encoded) == 2 and [image.mode for image in encoded] == ["RGB", "L"]
    taken = weakref.ref(encoded[0])
    assert taken() is None
    with pytest.raises(ApiError, match="cannot be read"):
        Encoded([png((200, 200))[:-60]])[0]


def test_the_pixels_of_all_images_count_together(served) -> None:
    client = served(limits={"pixels": 2_000})
    assert client.ask(question("What?", data_url(png((40, 30))))).status_code == 200
    done = client.ask(question("What?", *[data_url(png((40, 30)))] * 2))
    assert done.status_code == 400 and "image 2 has 40x30 pixels" in done.json()["error"]["message"]


@pytest.mark.parametrize("url, reason", [
    ("data:image/png,plain", "expected `data:image"), ("data:image/png;base64,a*b=", "no base64"),
    ("data:image/png;base64,abc", "no base64"), ("https://example.org/a.png", "--allow-remote-images"),
    ("http://example.org/a.png", "by https only"), ("/etc/passwd", "--image-root"),
    ("file:///etc/passwd", "--image-root"),
])
def test_what_was_not_allowed_is_not_read(url: str, reason: str) -> None:
    with pytest.raises(ApiError, match=reason) as refusal:
        image_bytes(url, ServeSettings("small"), lambda url: pytest.fail("nothing may be fetched"))
    assert refusal.value.status == 400


def test_line_breaks_in_base64_are_none_of_our_business() -> None:
    url = data_url(png())
    assert image_bytes(url[:90] + "\r\n" + url[90:], ServeSettings("small"), None) == png()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a b.png").write_bytes(b"inside")
    (tmp_path / "secret.png").write_bytes(b"outside")
    (tmp_path / "root-too").mkdir()
    (tmp_path / "root-too" / "c.png").write_bytes(b"outside")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "in.png").symlink_to(folder / "sub" / "a b.png")
    os.mkfifo(folder / "pipe.png")
    return folder


def test_files_below_the_root_are_read(root: Path) -> None:
    settings = ServeSettings("small", image_root=root)
    path = root / "sub" / "a b.png"
    for url in ("sub/a b.png", str(path), f"file://{path}".replace(" ", "%20"), "in.png", "sub/../sub/a b.png"):
        assert image_bytes(url, settings, None) == b"inside", url


def test_nothing_else_is_read_and_all_refusals_look_the_same(root: Path) -> None:
    settings = ServeSettings("small", image_root=root)
    urls = ["../secret.png", "out.png", "up/secret.png", str(root.parent / "secret.png"), "/etc/passwd", "none.png",
            "sub", ".", "pipe.png", "../root-too/c.png", "file://otherhost/etc/passwd", "a\0b", "ftp://x/y",
            "file:///etc/passwd", "%2e%2e/secret.png", "/dev/zero", "x" * 5000]
    messages = set()
    for url in urls:
        with pytest.raises(ApiError) as refusal:
            image_bytes(url, settings, None)
        messages.add((refusal.value.status, refusal.value.message))
    assert len(messages) == 1


def test_a_file_larger_than_the_limit_is_refused_before_it_is_read(root: Path, served) -> None:
    (root / "large.png").write_bytes(bytes(3_000))
    done = served(limits={"body_bytes": 2_000}, image_root=root).ask(question("What?", "large.png"))
    assert done.status_code == 413 and "3,000 bytes" in done.json()["error"]["message"]


def test_an_image_of_another_host_is_asked_about(served) -> None:
    fetched = []
    client = served(image_hosts=frozenset({"example.org"}), fetch=lambda url: fetched.append(url) or png((50, 20)))
    done = client.ask(question("What?", "https://example.org/a.png"))
    assert done.json()["choices"][0]["image_size"] == [50, 20] and fetched == ["https://example.org/a.png"]

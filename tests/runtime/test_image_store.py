"""Encoded images on disk: whole or not at all, within their bound, shared by processes."""

import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl2.errors import VL2Error
from vl2.runtime.image_store import ImageStore

ROWS = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
FILE_BYTES = 60 + ROWS.nbytes


def key(number: int) -> bytes:
    return hashlib.sha256(bytes([number])).digest()


def files(folder: Path) -> list[Path]:
    return sorted((folder / "images").iterdir())


def test_what_was_put_comes_back_bit_for_bit_after_a_restart(tmp_path: Path) -> None:
    ImageStore(tmp_path, 10_000).put(key(1), ROWS)
    found = ImageStore(tmp_path, 10_000).get(key(1))
    assert found.dtype == np.float32 and not found.flags.writeable
    np.testing.assert_array_equal(found, ROWS)
    assert ImageStore(tmp_path, 10_000).get(key(2)) is None


@settings(max_examples=40)
@given(data=st.data())
def test_a_damaged_file_is_never_used_and_is_removed_with_a_warning(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = ImageStore(folder, 10_000)
    store.put(key(1), ROWS)
    path, = files(folder)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)):]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert store.get(key(1)) is None and files(folder) == []
    store.put(key(1), ROWS)
    assert store.get(key(1)) is not None


def test_the_warning_names_the_damaged_file(tmp_path: Path, caplog) -> None:
    store = ImageStore(tmp_path, 10_000)
    store.put(key(1), ROWS)
    path, = files(tmp_path)
    path.write_bytes(b"")
    with caplog.at_level(logging.WARNING, "vl2.runtime"):
        assert store.get(key(1)) is None
    assert str(path) in caplog.text and "damaged" in caplog.text


def test_a_file_under_another_images_name_is_not_taken_for_it(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, 10_000)
    store.put(key(1), ROWS)
    path, = files(tmp_path)
    path.rename(path.with_name(f"{key(2).hex()}.vectors"))
    assert store.get(key(2)) is None


def test_the_bound_holds_and_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, 3 * FILE_BYTES)
    for number in range(3):
        store.put(key(number), ROWS)
        os.utime(store._path(key(number)), (number, number))
    assert store.get(key(0)) is not None
    store.put(key(3), ROWS)
    assert [store.get(key(number)) is not None for number in range(4)] == [True, False, True, True]
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 3 * FILE_BYTES
    ImageStore(tmp_path, FILE_BYTES)
    assert len(files(tmp_path)) == 1


def test_an_image_larger_than_the_bound_is_not_written(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, FILE_BYTES - 1)
    store.put(key(1), ROWS)
    assert files(tmp_path) == []


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, FILE_BYTES)
    stranger = tmp_path / "images" / "holiday.vectors"
    stranger.write_bytes(b"x" * 5000)
    for number in range(3):
        store.put(key(number), ROWS)
    assert stranger.exists() and len(files(tmp_path)) == 2


def test_parts_of_dead_processes_are_removed_and_young_ones_left(tmp_path: Path) -> None:
    ImageStore(tmp_path, 10_000)
    old, young = (tmp_path / "images" / f"{name}.part" for name in ("old", "young"))
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (time.time() - 3600,) * 2)
    ImageStore(tmp_path, 10_000)
    assert files(tmp_path) == [young]


def test_a_folder_that_cannot_be_made_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(VL2Error, match="cache folder .*file.* cannot be made") as error:
        ImageStore(tmp_path / "file", 10_000)
    assert error.value.hint


def test_a_full_disk_is_told_once_and_leaves_no_part(tmp_path: Path, monkeypatch, caplog) -> None:
    store = ImageStore(tmp_path, 10_000)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for number in range(3):
        store.put(key(number), ROWS)
    assert files(tmp_path) == [] and caplog.text.count("No space left on device") == 1


WRITER = """
import sys, numpy as np, hashlib
from pathlib import Path
from vl2.runtime.image_store import ImageStore
store = ImageStore(Path(sys.argv[1]), int(sys.argv[2]))
print("ready", flush=True)
for step in range(int(sys.argv[3])):
    number = step % 7
    key = hashlib.sha256(bytes([number])).digest()
    store.put(key, np.full((2000, 64), number, np.float32))
    found = store.get(key)
    assert found is None or (found == number).all()
"""


def start_writer(folder: Path, limit: int, steps: int) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", WRITER, folder, str(limit), str(steps)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    return process


def test_processes_that_write_and_read_together_see_whole_images_within_the_bound(tmp_path: Path) -> None:
    limit = 3 * (60 + 2000 * 64 * 4)
    writers = [start_writer(tmp_path, limit, 60) for _ in range(3)]
    for writer in writers:
        assert writer.communicate()[1] == "" and writer.returncode == 0
    ImageStore(tmp_path, limit)
    left = files(tmp_path)
    assert left and all(path.suffix == ".vectors" for path in left)
    assert sum(path.stat().st_size for path in left) <= limit


def test_a_killed_writer_never_leaves_a_half_image_under_its_name(tmp_path: Path, caplog) -> None:
    for delay in np.linspace(0.0005, 0.02, 6):
        writer = start_writer(tmp_path, 1 << 30, 10_000)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        store = ImageStore(tmp_path, 1 << 30)
        for number in range(7):
            found = store.get(key(number))
            assert found is None or (found.shape == (2000, 64) and (found == number).all())
    assert caplog.text == "" and any(path.suffix == ".vectors" for path in files(tmp_path))

"""Dropping pages of mapped weights: of a bundle's own files only."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

import pytest

from vl2 import mapped_pages

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux only")


def test_files_beside_and_below_a_bundle_are_left_alone(tmp_path: Path) -> None:
    """A library in `bundle-env/` or `bundle/venv/` would lose what it wrote into its private pages."""
    kept = {}
    for place in ("bundle/decoder.data", "bundle-env/library.so", "bundle/venv/library.so"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"a" * mmap.PAGESIZE)
        with path.open("r+b") as file:
            kept[place] = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
        kept[place][:1] = b"b"
    bundle = tmp_path / "bundle"
    assert len(mapped_pages._mapped_ranges(str(bundle.resolve()))) == 1
    mapped_pages.drop_file_pages(bundle)
    assert {place: held[:1] for place, held in kept.items()} == {
        "bundle/decoder.data": b"a", "bundle-env/library.so": b"b", "bundle/venv/library.so": b"b"}


def test_a_bundle_named_by_a_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "decoder.data").write_bytes(b"a" * mmap.PAGESIZE)
    os.symlink("real", tmp_path / "link")
    with (tmp_path / "link" / "decoder.data").open("r+b") as file:
        held = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    held[:1] = b"b"
    mapped_pages.drop_file_pages(tmp_path / "link")
    assert held[:1] == b"a"
    held.close()
    shutil.rmtree(tmp_path / "real")

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import GOLDENS
from vl2.errors import VL2Error
from vl2.safetensors_file import DTYPE_BYTES, INDEX_NAME, SINGLE_NAME, checkpoint_entries, read_header

TWO = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write(path: Path, header: Any, data: bytes = bytes(32)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_header_gives_name_dtype_shape_and_place_of_every_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}, **TWO}, bytes(range(32)))
    entries = read_header(path)
    assert list(entries) == ["a", "b"]
    b = entries["b"]
    assert (b.name, b.dtype, b.shape, b.size_bytes, b.path) == ("b", "BF16", (4,), 8, path)
    assert path.read_bytes()[b.offset : b.offset + b.size_bytes] == bytes(range(24, 32))


def test_an_empty_file_of_no_tensors_is_valid(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "x.safetensors", {}, b"")) == {}


def entry(**changes: Any) -> dict[str, Any]:
    return {**TWO, "b": {**TWO["b"], **changes}}


BROKEN = {
    "unknown dtype": (entry(dtype="Q4"), "tensor `b` in .* has the unknown dtype 'Q4', expected one of F64, F32"),
    "dtype that is no name": (entry(dtype=["F32"]), "tensor `b` in .* has the unknown dtype"),
    "nested without end": (b"[" * 200_000, "has a broken header"),
    "size that does not follow": (entry(shape=[5]), r"tensor `b` in .* takes 8 bytes, but BF16 \[5\] needs 10"),
    "overlap": (entry(data_offsets=[16, 24]), "tensor `b` in .* overlaps the tensor before it"),
    "hole": (entry(data_offsets=[28, 36]), "tensor `b` in .* leaves a hole before it"),
    "negative shape": (entry(shape=[-4]), "tensor `b` in .* has a malformed shape or offset"),
    "fractional shape": (entry(shape=[4.0]), "malformed shape or offset"),
    "missing key": ({"a": {"dtype": "F32"}}, "tensor `a` in .* has a malformed header entry"),
    "three offsets": (entry(data_offsets=[24, 32, 40]), "malformed header entry"),
    "data left over": ({"a": TWO["a"]}, "has 8 bytes after its last tensor"),
    "no JSON": (b"{nonsense", "has a broken header"),
    "not UTF-8": (b'{"\xff": 1}', "has a broken header"),
    "no object": ([], "has a header of type list"),
    "a name twice": (b'{"a": {}, "a": {}}', "occurs twice"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_header_is_refused_by_tensor_and_file(tmp_path: Path, kind: str) -> None:
    header, message = BROKEN[kind]
    path = write(tmp_path / "broken.safetensors", header)
    with pytest.raises(VL2Error, match=message) as error:
        read_header(path)
    assert str(path) in error.value.message


@pytest.mark.parametrize("length", (0, 5, 8, 20))
def test_a_file_cut_off_before_or_in_its_header_is_truncated(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x.safetensors", TWO)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(VL2Error, match="x.safetensors is truncated: its header needs"):
        read_header(path)


@settings(deadline=None)
@given(missing=st.integers(1, 32))
def test_a_file_cut_off_anywhere_in_its_data_is_truncated(
    tmp_path_factory: pytest.TempPathFactory, missing: int
) -> None:
    path = write(tmp_path_factory.mktemp("cut") / "x.safetensors", TWO)
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(VL2Error, match="is truncated"):
        read_header(path)


def test_an_absurd_header_length_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(2 << 30)
    with pytest.raises(VL2Error, match="has a header of 1073741824 bytes"):
        read_header(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VL2Error, match="cannot read .*none.safetensors"):
        read_header(tmp_path / "none.safetensors")


TENSORS = st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 5), max_size=3))


@settings(deadline=None)
@given(shapes=st.lists(TENSORS, max_size=6))
def test_any_well_formed_header_reads_back(tmp_path_factory: pytest.TempPathFactory, shapes: list) -> None:
    header, offset = {}, 0
    for i, (dtype, shape) in enumerate(shapes):
        size = DTYPE_BYTES[dtype] * int(np.prod(shape, dtype=int))
        header[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    entries = read_header(write(tmp_path_factory.mktemp("any") / "x.safetensors", header, bytes(offset)))
    assert {name: (e.dtype, list(e.shape)) for name, e in entries.items()} == {
        f"t{i}": shape for i, shape in enumerate(shapes)
    }


@pytest.mark.parametrize("checkpoint, tensors", (("tiny-mini", 198), ("small-mini", 250), ("base-mini", 241)))
def test_single_file_shards_and_index_give_all_tensors(checkpoint: str, tensors: int) -> None:
    entries = checkpoint_entries(GOLDENS / checkpoint)
    assert len(entries) == tensors
    assert len({entry.path for entry in entries.values()}) == (3 if checkpoint == "small-mini" else 1)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write(tmp_path / "one.safetensors", {"a": TWO["a"]}, bytes(24))
    write(tmp_path / "two.safetensors", {"b": {**TWO["b"], "data_offsets": [0, 8]}}, bytes(8))
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))


def test_the_index_is_followed_whatever_the_shards_are_called(sharded: Path) -> None:
    assert {name: entry.path.name for name, entry in checkpoint_entries(sharded).items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


def test_a_shard_that_the_index_names_and_the_folder_lacks_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(VL2Error, match="names the shard two.safetensors, which is missing"):
        checkpoint_entries(sharded)


@pytest.mark.parametrize(
    "weight_map, message",
    (
        ({"a": "one.safetensors", "b": "one.safetensors"}, "places tensor `b` in one.safetensors, which does not"),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "`c` in two.safetensors"),
        ({"a": "../one.safetensors"}, r"places tensor `a` in '../one.safetensors', expected"),
        ({"a": "one.bin"}, "places tensor `a` in 'one.bin', expected a .safetensors file"),
        ({"a": 1}, "places tensor `a` in 1"),
        ({}, "empty or malformed `weight_map`"),
        ([], "empty or malformed `weight_map`"),
    ),
)
def test_an_index_that_does_not_match_its_shards_is_refused(sharded: Path, weight_map: Any, message: str) -> None:
    index(sharded, weight_map)
    with pytest.raises(VL2Error, match=message):
        checkpoint_entries(sharded)


def test_a_shard_with_a_tensor_that_the_index_does_not_list_is_refused(sharded: Path) -> None:
    write(sharded / "one.safetensors", TWO)
    index(sharded, {"a": "one.safetensors"})
    with pytest.raises(VL2Error, match="one.safetensors holds tensor `b`, which .* does not place there"):
        checkpoint_entries(sharded)


@pytest.mark.parametrize("text", ("{", "[]", '{"metadata": {}}', "null", '{"a":' * 200_000))
def test_a_broken_index_is_named(sharded: Path, text: str) -> None:
    (sharded / INDEX_NAME).write_text(text)
    with pytest.raises(VL2Error, match=f"{INDEX_NAME} is not a valid index"):
        checkpoint_entries(sharded)


@pytest.mark.parametrize("name", ("pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"))
def test_pickled_weights_are_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(VL2Error, match=rf"Python pickle \({name}\), which can run code") as error:
        checkpoint_entries(tmp_path)
    assert "safetensors" in error.value.hint


def test_a_folder_without_weights_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(VL2Error, match=f"neither {INDEX_NAME} nor {SINGLE_NAME}"):
        checkpoint_entries(tmp_path)

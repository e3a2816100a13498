from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vl2.calib.tensor_file import read_slice, read_tensor, shapes_of, write_tensors
from vl2.safetensors_file import read_header

TENSORS = {"a": torch.arange(12.0).view(4, 3), "b": torch.tensor([1, 2], dtype=torch.int64),
           "c": torch.arange(5, dtype=torch.uint8), "none": torch.zeros(0, 3)}


def test_a_written_file_is_read_by_the_formats_own_library(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, shapes_of(TENSORS), TENSORS.items(), {"vl2": "{}"})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"vl2": "{}"}


def test_a_tensor_may_come_in_pieces_and_be_read_in_slices(tmp_path: Path) -> None:
    path, pieces = tmp_path / "t.safetensors", [("a", TENSORS["a"][:1]), ("a", TENSORS["a"][1:]), ("b", TENSORS["b"])]
    write_tensors(path, shapes_of({"a": TENSORS["a"], "b": TENSORS["b"]}), pieces)
    entries = read_header(path)
    assert read_slice(entries["a"], 1, 3).equal(TENSORS["a"][1:3])
    assert read_tensor(entries["b"]).equal(TENSORS["b"])


@pytest.mark.parametrize("pieces", [
    [("a", TENSORS["a"])],
    [("b", TENSORS["b"]), ("a", TENSORS["a"])],
    [("a", TENSORS["a"]), ("a", TENSORS["a"]), ("b", TENSORS["b"])],
    [("a", TENSORS["a"].double()), ("b", TENSORS["b"])],
])
def test_data_that_was_not_announced_leaves_no_file(tmp_path: Path, pieces: list) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(AssertionError):
        write_tensors(path, shapes_of({"a": TENSORS["a"], "b": TENSORS["b"]}), pieces)
    assert not path.exists()

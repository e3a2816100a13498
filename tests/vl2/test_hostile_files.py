"""Whatever a file of a checkpoint or bundle holds, reading it gives its content or a VL2Error, nothing else."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import NANO
from tests.runtime.small_bundle import build_bundle
from vl2.config import load_config
from vl2.errors import VL2Error
from vl2.manifest import check_sizes, read_manifest
from vl2.processor_config import read_processor_config
from vl2.prompt import Processor
from vl2.safetensors_file import read_header

# Values that parsers are wont to stumble over, beside arbitrary ones.
ODD = st.sampled_from([None, True, -1, 0, 1, 2**63, -(2**70), 1e308, float("nan"), float("inf"), "", "\0", "../x", "/",
                       "é" * 300, [], {}, [[]], {"": {}}])  # fmt: skip
VALUES = st.one_of(ODD, st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
                                     lambda inner: st.lists(inner, max_size=3), max_leaves=5))  # fmt: skip
# The same draws every time; the files are put back after each.
STEADY = settings(derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
READERS: dict[str, Callable[[Path], object]] = {
    "manifest.json": lambda folder: check_sizes(folder, read_manifest(folder)),
    "config.json": load_config,
    "processor_config.json": read_processor_config,
    "tokenizer.json": Processor.from_folder,
    "special_tokens_map.json": Processor.from_folder,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle, and all of a checkpoint but its weights."""
    checkpoint = tmp_path_factory.mktemp("hostile")
    for path in NANO.glob("*.json"):
        shutil.copy(path, checkpoint)
    return build_bundle(tmp_path_factory.mktemp("hostile") / "small.bundle"), checkpoint


@pytest.fixture
def folder(folders: tuple[Path, Path], name: str) -> Path:
    """The one that has the file."""
    return folders[name != "manifest.json"]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON tree; of long lists and objects the first forty."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in list(inner)[:40] for place in places(child, (*path, key)))]


def changed(content: Any, path: tuple, value: Any, remove: bool) -> Any:
    if not path:
        return value
    content = copy.deepcopy(content)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if remove:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return content


def read(folder: Path, name: str, content: bytes) -> bool:
    """Whether the file was taken; anything but a VL2Error is raised."""
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        READERS[name](folder)
    except VL2Error as error:
        assert str(error)
        return False
    finally:
        (folder / name).write_bytes(whole)
    return True


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_taken(folder: Path, name: str) -> None:
    assert read(folder, name, (folder / name).read_bytes())


@pytest.mark.parametrize("name", ["processor_config.json"])
def test_an_infinite_size_is_refused(folder: Path, name: str) -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    endless = changed(content, ("candidate_resolutions", 0, 0), float("inf"), remove=False)
    assert not read(folder, name, json.dumps(endless).encode())


@pytest.mark.parametrize("name", READERS)
@settings(STEADY, max_examples=70)
@given(data=st.data())
def test_one_value_changed_or_removed_is_read_or_refused(folder: Path, name: str, data: st.DataObject) -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    path = data.draw(st.sampled_from(places(content)))
    after = changed(content, path, data.draw(VALUES), remove=data.draw(st.booleans()))
    read(folder, name, json.dumps(after).encode())


@pytest.mark.parametrize("name", READERS)
@settings(STEADY, max_examples=40)
@given(data=st.data())
def test_bytes_lost_or_flipped_are_read_or_refused(folder: Path, name: str, data: st.DataObject) -> None:
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    read(folder, name, bytes(content[: data.draw(st.integers(0, len(content)))]))


@settings(STEADY, max_examples=200)
@given(data=st.data())
def test_a_safetensors_header_of_any_bytes_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    header = data.draw(st.one_of(st.binary(max_size=60), st.dictionaries(st.text(max_size=4), VALUES, max_size=3).map(
        lambda content: json.dumps(content).encode())))  # fmt: skip
    said = data.draw(st.one_of(st.just(len(header)), st.integers(0, 2**64 - 1)))
    path = tmp_path / "x.safetensors"
    path.write_bytes(said.to_bytes(8, "little") + header + bytes(data.draw(st.integers(0, 40))))
    try:
        read_header(path)
    except VL2Error as error:
        assert str(path) in str(error)

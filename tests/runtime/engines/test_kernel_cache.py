"""What TensorRT-RTX compiles is compiled for good before a step is captured, and kept for the next process."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tests.runtime.engines.conftest import Machine, with_engines
from vl2.runtime import BundleOptions, GenerationOptions, open_bundle

SHORT = GenerationOptions(4, ignore_eos=True)


@pytest.fixture
def asked(tiny: Path, machine: Machine):
    """Asks a new model of the same bundle; the tokens of its answer."""
    with_engines(tiny)
    return lambda **options: open_bundle(tiny, BundleOptions(**options)).ask("What?", options=SHORT).token_ids


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "vl2" / "engines").glob("*"))


def strategies(machine: Machine) -> list[str]:
    return [context.config.dynamic_shapes_kernel_specialization_strategy for context in machine.trt.contexts]


def test_only_steps_that_are_captured_wait_for_their_kernels(asked, machine: Machine) -> None:
    asked()
    assert strategies(machine) == ["lazy", "eager"]
    asked(cuda_graph=False)
    assert strategies(machine)[2:] == ["lazy", "lazy"]


def test_compiled_kernels_are_kept_and_read_by_the_next_process(asked, machine: Machine, tmp_path: Path) -> None:
    asked()
    (path,) = kept(tmp_path)
    assert json.loads(path.read_text()) == {"lazy": 1, "eager": 1}
    path.write_text(json.dumps({"lazy": 5}))
    asked()
    assert json.loads(path.read_text()) == {"lazy": 5, "eager": 1}
    assert kept(tmp_path) == [path], "an unfinished file was left"


def test_a_broken_file_is_dropped_and_made_again(asked, tmp_path: Path) -> None:
    wanted = asked()
    (path,) = kept(tmp_path)
    path.write_bytes(b"no kernels")
    assert asked() == wanted
    assert json.loads(path.read_text()) == {"lazy": 1, "eager": 1}


def test_a_folder_that_cannot_be_written_is_said_and_costs_no_answer(asked, tmp_path: Path, caplog) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING, "vl2.runtime"):
        assert len(asked()) == 4
    assert "compiled kernels are not kept in" in caplog.text


def test_tensorrt_without_such_a_cache_runs_as_ever(asked, machine: Machine, tmp_path: Path) -> None:
    del machine.trt.DynamicShapesKernelSpecializationStrategy
    assert len(asked()) == 4 and kept(tmp_path) == [] and strategies(machine) == ["none", "none"]

"""Bundles with fake engines, and a machine whose CUDA driver and TensorRT are fakes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.engines.fake_cuda import FakeDriver
from tests.runtime.engines.fake_tensorrt import VERSION, fake_tensorrt
from vl2.engine_record import EngineRecord
from vl2.manifest import file_facts, read_manifest, write_manifest
from vl2.plugins.tensorrt.engines import EngineSizes, engine_file, profiles
from vl2.plugins.tensorrt.sources import plugin_hash
from vl2.runtime.engines.device import Device

SIZES = EngineSizes(context=700, prefill_chunk=48, tiles=2)
RECORD = EngineRecord("tensorrt-rtx", VERSION, "8.9", plugin_hash(), vars(SIZES), {}, {}, {})


@dataclass
class Machine:
    """driver, trt: the fakes."""

    driver: FakeDriver
    trt: Any


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """TensorRT-RTX on a GPU of compute capability 8.9; other TensorRTs are not installed."""
    driver = FakeDriver()
    trt = fake_tensorrt(driver)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("vl2.runtime.engines.find.load_tensorrt", lambda flavour: trt)
    monkeypatch.setattr("vl2.runtime.engines.find.open_device", lambda: Device(driver))
    monkeypatch.setattr("vl2.runtime.engines.library.launcher_of", lambda device: None)
    return Machine(driver, trt)


def with_engines(bundle: Path, target: str = "rtx-4090", sizes: EngineSizes = SIZES, **changes: object) -> Path:
    """Writes fake engines into a bundle and records them; changes: of the record."""
    manifest, files, ranges = read_manifest(bundle), {}, {}
    for name, graph in manifest.graphs.items():
        files[name], ranges[name] = engine_file(name, target), list(profiles(name, graph, sizes))
        facts = {"graph": str(bundle / graph.file), "profiles": ranges[name]}
        (bundle / files[name]).write_text(json.dumps(facts))
    record = replace(RECORD, sizes=vars(sizes), profiles=ranges, files=files, **changes)
    facts = {name: file_facts(bundle / name) for name in files.values()}
    engines = {**manifest.engines, target: record}
    write_manifest(bundle, replace(manifest, files=manifest.files | facts, engines=engines))
    return bundle


@pytest.fixture(scope="session")
def trt_bundle_of(bundle_of: Callable[..., Path], quantized_of: Callable[..., Path]) -> Callable[..., Path]:
    """`trt_bundle_of(checkpoint, scheme)`: without engines; scheme int4 is quantized first."""

    def export(checkpoint: Path, scheme: str = "fp16") -> Path:
        if scheme == "fp16":
            return bundle_of(checkpoint, "fp16", "trt")
        return bundle_of(quantized_of(checkpoint, scheme), None, "trt")

    return export


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """`copied(bundle)`: a copy for the engines of one test."""
    return lambda bundle: Path(shutil.copytree(bundle, tmp_path / bundle.name))


@pytest.fixture
def tiny(goldens: Path, trt_bundle_of: Callable[..., Path], copied: Callable[[Path], Path]) -> Path:
    """The trt bundle of tiny-mini, without engines."""
    return copied(trt_bundle_of(goldens / "tiny-mini"))

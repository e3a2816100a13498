"""Fixtures around the small bundle."""

import shutil
from pathlib import Path

import pytest

from tests.runtime.small_bundle import build_bundle, numpy_model_of
from vl2.runtime import Model


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory) -> Path:
    return build_bundle(tmp_path_factory.mktemp("bundles") / "small.bundle")


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy that a test may damage, with a hash cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(shared_bundle, tmp_path / "small.bundle"))


@pytest.fixture
def numpy_model(shared_bundle: Path) -> Model:
    """The small bundle on the NumPy backend."""
    return numpy_model_of(shared_bundle)

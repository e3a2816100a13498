from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import GOLDENS
from vl2.calib.calibration_set import CalibrationSet
from vl2.calib.data import CalibrationData, DataOptions, read_data
from vl2.calib.embed import embed_calibration
from vl2.prompt import Processor


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor.from_folder(GOLDENS / "tiny-mini")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A small image file beside the data files of a test."""
    path = tmp_path / "page.png"
    Image.new("RGB", (40, 30), (200, 30, 60)).save(path)
    return path


@pytest.fixture(scope="session")
def synthetic_data(processor: Processor) -> CalibrationData:
    return read_data(None, processor, DataOptions(samples=3, seed=5))


@pytest.fixture(scope="session")
def mini_set(mini_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CalibrationSet]:
    """Each miniature checkpoint's calibration set: three documents of different lengths."""
    data = read_data(None, Processor.from_folder(mini_folder), DataOptions(samples=3, seed=5))
    folder = tmp_path_factory.mktemp("calibration") / mini_folder.name
    return folder, embed_calibration(mini_folder, data, folder)

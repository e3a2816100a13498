"""Each miniature checkpoint beside its quantized form, measured once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vl2.calib.data import CalibrationData, DataOptions, read_data
from vl2.layerwise.measure import measure_layers
from vl2.prompt import Processor


class Measured(NamedTuple):
    """A reference, what is held against it, the data, and the report."""

    reference: Path
    quantized: Path
    data: CalibrationData
    report: dict[str, Any]


def data_for(folder: Path, samples: int = 1) -> CalibrationData:
    """Synthetic documents, other ones than calibration draws by default."""
    return read_data(None, Processor.from_folder(folder), DataOptions(samples=samples, seed=5))


@pytest.fixture(scope="session")
def measured(mini_folder: Path, quantized_of) -> Measured:
    """INT4 experts, everything else that can be INT8."""
    quantized, data = quantized_of(mini_folder, "int4"), data_for(mini_folder)
    return Measured(mini_folder, quantized, data, measure_layers(mini_folder, quantized, data))

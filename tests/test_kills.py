"""kill -9 at any moment: what has the final name is whole, and the same command goes on to the same bytes.

`VL2_KILLS=34 python -m pytest tests/test_kills.py`: each of three jobs is run again and again in a child that is killed
after a random time, 34 times. Minutes long, so it is skipped without; single moments are tested beside the jobs.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import GOLDENS
from tests.forked import in_a_child
from vl2.calib.data import DataOptions
from vl2.calib.progress import silent
from vl2.calib.stream import StreamOptions
from vl2.cli.calibrated import CalibratedJob, make_calibration_set, quantize_calibrated, read_calibration_data
from vl2.export import ExportOptions, export_checkpoint
from vl2.quant.quantizer import QuantizeOptions
from vl2.runtime.image_store import ImageStore

KILLS = int(os.environ.get("VL2_KILLS", "0"))
pytestmark = pytest.mark.skipif(not KILLS, reason="takes minutes; VL2_KILLS=34 runs it")
CHECKPOINT = GOLDENS / "tiny-mini"
IMAGES = [(hashlib.sha256(bytes([number])).digest(), np.full((300, 64), number, np.float32)) for number in range(40)]


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip


def kill_until_done(job: Callable[[], object], out: Path) -> None:
    """Checks `out` after every kill and every end; starts afresh after an end until there were KILLS kills."""
    assert in_a_child(job, None)
    whole, draw, killed = content(out), random.Random(0), 0
    begun = time.monotonic()
    shutil.rmtree(out)
    assert in_a_child(job, None) and content(out) == whole, "the job does not give the same bytes twice"
    seconds = time.monotonic() - begun
    shutil.rmtree(out)
    while killed < KILLS:
        ended = in_a_child(job, draw.uniform(0, 1.1 * seconds))
        killed += not ended
        assert content(out) == whole if out.exists() else not ended
        if ended:
            shutil.rmtree(out)
    assert out.exists() or in_a_child(job, None)
    assert content(out) == whole and [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_killed_export_goes_on_to_the_same_bundle(tmp_path: Path) -> None:
    def job() -> None:
        export_checkpoint(CHECKPOINT, tmp_path / "run" / "bundle", ExportOptions("fp16", verify=False))

    (tmp_path / "run").mkdir()
    export_checkpoint(CHECKPOINT, tmp_path / "first", ExportOptions("fp16", verify=False))  # children share its traces
    kill_until_done(job, tmp_path / "run" / "bundle")


def test_a_killed_quantization_goes_on_to_the_same_checkpoint(tmp_path: Path) -> None:
    data = read_calibration_data(CHECKPOINT, None, DataOptions(samples=2, seed=0))
    make_calibration_set(CHECKPOINT, data, tmp_path / "calibration", silent)
    out = tmp_path / "run" / "quantized"
    out.parent.mkdir()
    job = CalibratedJob(CHECKPOINT, tmp_path / "calibration", out, QuantizeOptions(method="gptq"), StreamOptions())
    kill_until_done(lambda: quantize_calibrated(job), out)


def test_a_killed_cache_gives_whole_images_only(tmp_path: Path) -> None:
    draw = random.Random(0)

    def fill() -> None:
        store = ImageStore(tmp_path, 20 * (60 + IMAGES[0][1].nbytes))
        for key, rows in IMAGES * 3:
            store.put(key, rows)

    for _ in range(KILLS):
        in_a_child(fill, draw.uniform(0.001, 0.1))
        store = ImageStore(tmp_path, 1 << 30)
        found = [(store.get(key), rows) for key, rows in IMAGES]
        assert all(got is None or np.array_equal(got, rows) for got, rows in found)
        assert any(got is not None for got, _ in found)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A fork takes along the thread that calls it only."""
    import torch

    torch.set_num_threads(1)

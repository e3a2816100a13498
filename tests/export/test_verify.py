"""The parity run: it must pass what is right and catch what is not."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tolerances import SAME_LOGITS, assert_close
from vl2.errors import VL2Error
from vl2.export import ExportOptions, export_checkpoint
from vl2.export.checkpoint import open_checkpoint
from vl2.export.reference import StreamedModel
from vl2.export.verify import verify_bundle
from vl2.manifest import read_manifest
from vl2.mapped_pages import bounded_file_pages
from vl2.model.checkpoint import load_model
from vl2.model.decoder import positions_from_mask


def silent(stage: str, done_bytes: int, total_bytes: int) -> None:
    """No one looks."""


@torch.inference_mode()
def test_the_streamed_model_equals_the_whole_one(mini_folder: Path) -> None:
    whole, streamed = load_model(mini_folder), StreamedModel(open_checkpoint(mini_folder), "fp32")
    side, size = whole.config.tile_size, whole.config.language_config.hidden_size
    torch.manual_seed(0)
    tiles, embeds, mask = torch.rand(2, 3, side, side), torch.randn(1, 11, size), torch.ones(1, 11, dtype=torch.bool)
    assert torch.equal(streamed.encode_tiles(tiles), whole.encode_tiles(tiles))
    wanted = whole(embeds, positions_from_mask(mask), mask)[0][0, -4:]
    assert_close(streamed.logits(embeds, 4), wanted, SAME_LOGITS)


@pytest.mark.parametrize("file", ["vision.data", "decoder.data", "embeddings.safetensors"])
def test_spoilt_weights_do_not_pass(goldens: Path, tmp_path: Path, bundle_of, file: str) -> None:
    checkpoint = goldens / "tiny-mini"
    bundle = Path(shutil.copytree(bundle_of(checkpoint, "fp32"), tmp_path / "bundle"))
    numbers = np.memmap(bundle / file, np.float32, "r+")
    numbers[len(numbers) // 2 :] *= np.float32(1.01)
    numbers.flush()
    with pytest.raises(VL2Error, match="disagree"):
        verify_bundle(bundle, read_manifest(bundle), open_checkpoint(checkpoint), silent)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists mapped pages")
def test_pages_of_mapped_files_are_dropped_beyond_the_limit(tmp_path: Path) -> None:
    (tmp_path / "weights.data").write_bytes(bytes(64 << 20))
    mapped = np.memmap(tmp_path / "weights.data", np.uint8, "c")

    def resident_bytes() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1]) * 1024

    idle = resident_bytes()
    assert mapped[::4096].sum() == 0 and resident_bytes() > idle + (60 << 20)
    with bounded_file_pages(tmp_path, idle):
        deadline = 200
        while resident_bytes() > idle + (8 << 20) and deadline:
            deadline -= 1
            time.sleep(0.02)
    assert resident_bytes() <= idle + (8 << 20)
    assert mapped[::4096].sum() == 0


def test_too_little_memory_for_the_parity_run_is_said_first(goldens: Path, tmp_path: Path, monkeypatch) -> None:
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal: 900000 kB\nMemAvailable: 300000 kB\n")
    monkeypatch.setattr("vl2.memory._MEMINFO", memory)
    with pytest.raises(VL2Error, match="0.3 GB are available") as caught:
        export_checkpoint(goldens / "tiny-mini", tmp_path / "bundle", ExportOptions())
    assert "--no-verify" in caught.value.hint
    assert not (tmp_path / "bundle").exists() and not (tmp_path / ".bundle.partial").exists()

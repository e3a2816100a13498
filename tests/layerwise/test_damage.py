"""What was damaged comes out as the worst row, and what was not as lossless."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import GOLDENS
from tests.layerwise.conftest import data_for
from vl2.layerwise.measure import measure_layers

CHECKPOINT = GOLDENS / "tiny-mini"
_LAYER = "language.model.layers.2."


def changed_copy(folder: Path, tensor: str, change: Callable[[Tensor], Tensor]) -> Path:
    """A copy of the checkpoint with one tensor changed."""
    shutil.copytree(CHECKPOINT, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    tensors[tensor] = change(tensors[tensor]).contiguous()
    save_file(tensors, shard, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def report_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable], dict[str, Any]]:
    data = data_for(CHECKPOINT)

    def measure(tensor: str, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        damaged = changed_copy(tmp_path_factory.mktemp("damaged") / "damaged", tensor, change)
        return measure_layers(CHECKPOINT, damaged, data)

    return measure


def noisy(weight: Tensor) -> Tensor:
    return weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


def worst_block(report: dict[str, Any]) -> str:
    lost = [row for row in report["blocks"] if row["own"] is not None and row["own"]["all"]["error"]]
    return max(lost, key=lambda row: row["own"]["all"]["error"])["block"]


@pytest.mark.parametrize("tensor, block", [
    (f"{_LAYER}self_attn.o_proj.weight", "layers.2.attention"),
    (f"{_LAYER}mlp.experts.5.down_proj.weight", "layers.2.mlp"),
    ("vision.blocks.1.mlp.fc1.weight", "vision.blocks.1"),
    ("projector.layers.2.weight", "projector"),
])
def test_a_damaged_matrix_is_the_worst_row_and_its_block_the_worst_block(
    report_of: Callable, tensor: str, block: str
) -> None:
    report = report_of(tensor, noisy)
    (row,) = report["matrices"]
    assert row["tensor"] == tensor.removesuffix(".weight") and row["form"] is None
    assert 9 < row["weights"]["sqnr_db"] < 12, "−20 log10 0.3"
    assert row["output"]["all"]["sqnr_db"] == pytest.approx(row["weights"]["sqnr_db"], abs=4)
    assert worst_block(report) == block
    others = [row["own"]["all"]["error"] for row in report["blocks"] if row["own"] and row["block"] != block]
    assert not any(others), "a block loses nothing by itself whose weights are the same"
    assert report["logits"]["image"]["kld"]["mean"] > 0


def test_a_damaged_router_is_the_worst_router(report_of: Callable) -> None:
    report = report_of(f"{_LAYER}mlp.gate.weight", noisy)
    routers = {row["layer"]: row["all"] for row in report["routers"]}
    assert routers[2]["own_percent"] > 10 and routers[2]["changed_percent"] == routers[2]["own_percent"]
    assert routers[1]["changed_percent"] == 0 and routers[3]["own_percent"] == 0
    assert routers[3]["changed_percent"] > 0, "layer 3 gets what layer 2's other experts gave"
    assert worst_block(report) == "layers.2.mlp"
    assert report["matrices"][0]["tensor"] == f"{_LAYER}mlp.gate"


def test_a_damaged_norm_and_token_table_are_found_though_they_are_no_linears(report_of: Callable) -> None:
    report = report_of(f"{_LAYER}post_attention_layernorm.weight", lambda gamma: 1.5 * gamma)
    assert report["matrices"][0]["tensor"] == f"{_LAYER}post_attention_layernorm"
    assert report["matrices"][0]["output"] is None and worst_block(report) == "layers.2.mlp"
    report = report_of("language.model.embed_tokens.weight", noisy)
    assert report["matrices"][0]["tensor"] == "language.model.embed_tokens"
    embeddings = next(row for row in report["blocks"] if row["block"] == "embeddings")["stream"]
    assert embeddings["image"]["sqnr_db"] is None and 9 < embeddings["text"]["sqnr_db"] < 12


def test_a_matrix_that_became_zero_and_one_that_was_have_figures(report_of: Callable) -> None:
    report = report_of(f"{_LAYER}self_attn.v_proj.weight", torch.zeros_like)
    (row,) = report["matrices"]
    assert row["weights"] == {"error": 1.0, "sqnr_db": 0.0, "cosine": 0.0}
    json.dumps(report, allow_nan=False)


def test_equal_checkpoints_lose_nothing() -> None:
    report = measure_layers(CHECKPOINT, CHECKPOINT, data_for(CHECKPOINT))
    json.dumps(report, allow_nan=False)
    assert report["matrices"] == [] and report["unchanged_tensors"] > 100
    for row in report["blocks"]:
        for side in filter(None, (row["own"], row["stream"])):
            found = side["all"]
            assert (found["error"], found["sqnr_db"]) == (0.0, None) and found["cosine"] == pytest.approx(1, abs=1e-12)
    assert all(row["all"]["changed_percent"] == 0 == row["all"]["own_percent"] for row in report["routers"])
    for found in filter(None, report["logits"].values()):
        assert found["kld"]["max"] == 0 and found["same_top1_percent"]["mean"] == 100

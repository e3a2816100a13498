"""Settings of the family that no published model uses: exported, and compared with PyTorch by the export itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.export.checkpoints import random_checkpoint
from vl2.export import ExportOptions, export_checkpoint

Change = Callable[[dict[str, Any]], None]


def language(**values: Any) -> Change:
    return lambda config: config["language_config"].update(values)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.7}
GROUPS = {"n_group": 4, "topk_group": 2}
LINEAR = {"type": "linear", "factor": 2.0}
NO_SHARED = {"n_shared_experts": None, "moe_layer_freq": 2, "first_k_dense_replace": 0}


def shared_keys_and_a_deep_projector(config: dict[str, Any]) -> None:
    config["projector_config"] |= {"depth": 3, "mlp_ratio": 2}
    config["language_config"] |= {"num_key_value_heads": 2, "attention_bias": True, "rope_scaling": LINEAR, **NO_SHARED}


# Several settings a case: an export costs seconds, and each setting has unit goldens of its own in tests/model.
CASES: dict[str, tuple[str, Change]] = {
    "a query rank, biases, yarn, group-limited and normalised routing": (
        "small-mini",
        language(q_lora_rank=24, attention_bias=True, rope_scaling=YARN, norm_topk_prob=True,
                 topk_method="group_limited_greedy", **GROUPS),
    ),
    "corrected routing in groups": ("base-mini", language(**GROUPS)),
    "shared keys, biases, linear positions, experts in every other layer, none shared, three projector layers": (
        "tiny-mini", shared_keys_and_a_deep_projector,
    ),
}


@pytest.mark.parametrize("lowering", ["cpu", "trt"])
def test_biases_and_greedy_routing_that_names_no_groups_are_in_every_lowering(
    goldens: Path, tmp_path: Path, lowering: str
) -> None:
    """The original's defaults: greedy routing reads no groups, whatever a configuration says of them."""
    change = language(attention_bias=True, n_group=None, topk_group=None)
    checkpoint = random_checkpoint(goldens / "tiny-mini", tmp_path / "checkpoint", change)
    options = ExportOptions(scheme="fp16", lowering=lowering)
    assert export_checkpoint(checkpoint, tmp_path / "bundle", options).verify["status"] == "passed"


@pytest.mark.parametrize("case", CASES)
def test_unpublished_settings_are_exported_at_parity(goldens: Path, tmp_path: Path, case: str) -> None:
    name, change = CASES[case]
    checkpoint = random_checkpoint(goldens / name, tmp_path / "checkpoint", change)
    manifest = export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(scheme="fp32"))
    assert manifest.verify["status"] == "passed"
    assert manifest.verify["logits_difference"] < 1e-4  # a tenth of the bound

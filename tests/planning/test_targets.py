"""Targets are data: the shipped table, a user's file over it, and every mistake in one named."""

import json
from pathlib import Path

import pytest

from vl2.errors import VL2Error
from vl2.planning.targets import Target, read_targets, target_named

BOARD = {"description": "my board", "memory": "shared", "memory_gib": 4, "bandwidth_gb_s": 34, "usable_share": 0.75,
         "backends": ["cpu", "engine"], "source": "its data sheet", "fp16_tflops": 2, "cpu_gflops": 60}


def test_the_shipped_table_has_the_devices_of_the_issue_with_their_sources() -> None:
    targets = read_targets()
    assert {"rtx-3060", "rtx-4060", "rtx-4090", "rtx-5090", "orin-nano-8gb", "orin-nx-16gb", "agx-orin-64gb", "thor",
            "raspberry-pi-5", "cpu"} == targets.keys()
    assert all(target.source and target.description for target in targets.values())
    # shared/guide/tensorrt.md, section 4
    assert {name: (targets[name].compute_capability, targets[name].memory_gib, targets[name].bandwidth_gb_s)
            for name in ("rtx-4060", "orin-nano-8gb", "thor")} == {
        "rtx-4060": ("8.9", 8, 272), "orin-nano-8gb": ("8.7", 8, 102), "thor": ("11.0", 128, 273)}


def test_a_users_file_adds_targets_and_replaces_shipped_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"my-board": BOARD, "cpu": {**BOARD, "memory": "host", "backends": ["cpu"]}}))
    targets = read_targets(file)
    assert targets["my-board"].usable_bytes == 3 * 2**30 and targets["cpu"].memory_gib == 4
    assert targets["thor"] == read_targets()["thor"]


@pytest.mark.parametrize("change, told", [
    ({"bandwith_gb_s": 3}, "my-board has an unknown key 'bandwith_gb_s'"),
    ({"memory": "soldered"}, "memory is 'soldered'"),
    ({"usable_share": 1.5}, "usable_share is 1.5"),
    ({"backends": ["tpu"]}, "backends is"),
    ({"cpu_gflops": None}, "cpu_gflops is None"),
    ({"fp16_tflops": None}, "fp16_tflops is None"),
    ({"memory_gib": "8"}, "my-board.memory_gib is '8'"),
])
def test_a_mistake_in_a_users_file_is_named(tmp_path: Path, change: dict, told: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"my-board": {**BOARD, **change}}))
    with pytest.raises(VL2Error) as error:
        read_targets(file)
    assert told in error.value.message and str(file) in error.value.message


def test_local_cannot_be_redefined_and_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"local": BOARD}))
    with pytest.raises(VL2Error, match="stands for this machine"):
        read_targets(file)
    with pytest.raises(VL2Error, match="no target `orin`, expected one of local, local-gpu, rtx-3060"):
        target_named("orin", read_targets())
    assert isinstance(target_named("thor", read_targets()), Target)

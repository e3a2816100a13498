"""The trained vl2-nano, stored as float16 against itself as float32: the noise floor of the whole measurement."""

from __future__ import annotations

from pathlib import Path

from vl2.accuracy.compare import CompareOptions, compare
from vl2.accuracy.questions import DataOptions

NANO = Path(__file__).parents[2] / "nano"
FEW = CompareOptions(data=DataOptions(limit=4))


def test_float16_storage_costs_no_more_than_rounding(nano_bundle: Path, bundle_of) -> None:
    report = compare(nano_bundle, bundle_of(NANO / "checkpoint", "fp16"), NANO / "heldout" / "heldout.jsonl", FEW)
    answer = report["logits"]["answer"]
    # The checkpoint is bfloat16, which float16 holds exactly in its normal range; guide 8.3 allows 6e-4.
    assert report["options"]["exact"] and answer["kld"]["max"] < 1e-6
    assert answer["same_top1_percent"]["mean"] == 100 and report["answers"]["equal_percent"] == 100

"""The trained vl2-nano, stored as float16 against itself as float32: the noise floor of the whole measurement."""

from __future__ import annotations

import json
from pathlib import Path

from vl2.accuracy.compare import CompareOptions, compare
from vl2.accuracy.questions import DataOptions
from vl2.nano.evaluate import read_questions

NANO = Path(__file__).parents[2] / "nano"
FEW = CompareOptions(data=DataOptions(limit=4))


def test_float16_storage_costs_no_more_than_rounding(nano_bundle: Path, bundle_of) -> None:
    report = compare(nano_bundle, bundle_of(NANO / "checkpoint", "fp16"), NANO / "heldout" / "heldout.jsonl", FEW)
    answer = report["logits"]["answer"]
    # The checkpoint is bfloat16, which float16 holds exactly in its normal range; guide 8.3 allows 6e-4.
    assert report["options"]["exact"] and answer["kld"]["max"] < 1e-6
    assert answer["same_top1_percent"]["mean"] == 100 and report["answers"]["equal_percent"] == 100


def test_held_out_rows_may_hold_separators_that_end_no_line_of_json(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "answer": f"a{separator}b"} for separator in "\u2028\u2029\x85"]
    path = tmp_path / "heldout.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert [row["answer"] for row in read_questions(path)] == [row["answer"] for row in rows]

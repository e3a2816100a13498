"""What the long verbs tell of their progress, and what they refuse before the long work begins."""

from __future__ import annotations

import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import GOLDENS
from vl2.calib.progress import Progress
from vl2.cli import cli, progress, run_command
from vl2.cli.plans import Extent, plan_quantization
from vl2.cli.progress import ByteProgress, WorkProgress
from vl2.quant.linears import matrices
from vl2.quant.parts import Part, part_of
from vl2.quant.quantizer import QuantizeOptions, Quantizer, quantize_checkpoint

TINY = GOLDENS / "tiny-mini"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """`clock(seconds)` moves the time that progress sees."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_work_without_an_estimate_is_estimated_from_what_was_told(clock, capsys: pytest.CaptureFixture[str]) -> None:
    told = WorkProgress()
    told.tell("a", 0.50)  # half was done by an earlier run
    clock(60)
    told.tell("b", 0.60)
    assert lines(capsys) == ["b, 60%, 4 min left"]
    told.tell("outer parts", 0.1)
    clock(31)
    told.tell("outer parts", 0.2)
    assert lines(capsys) == ["outer parts, 20%, 4 min left"], "a new scale begins where the share falls"


def test_a_part_of_what_was_told_last_keeps_its_share_and_time(clock, capsys: pytest.CaptureFixture[str]) -> None:
    told = WorkProgress()
    told(Progress("layer 1: expert statistics", 6.0, 10.0, 240.0))
    clock(31)
    told.tell("quantizing experts.3", None)
    clock(31)
    told.tell("head", 0.2)
    clock(31)
    told.tell("head", 0.6)
    assert lines(capsys) == ["quantizing experts.3, 60%, 4 min left", "head, 20%", "head, 60%, 31 s left"]


def test_a_scale_that_begins_above_where_the_last_one_began_is_timed_from_its_own_beginning(
    clock, capsys: pytest.CaptureFixture[str]
) -> None:
    told = WorkProgress()
    told(Progress("layer 0: attention statistics", 0.01, 10.0, 3600.0))
    clock(3600)
    told(Progress("layer 11: expert output", 9.9, 10.0, 36.0))
    capsys.readouterr()
    told.tell("vision.blocks.0.attn.qkv", 0.05)
    clock(31)
    told.tell("vision.blocks.9.attn.qkv", 0.3)
    assert lines(capsys) == ["vision.blocks.9.attn.qkv, 30%, 87 s left"]


def test_the_time_of_later_steps_is_told_in_proportion_to_the_rate_of_this_one(
    clock, capsys: pytest.CaptureFixture[str]
) -> None:
    told = WorkProgress(later=2.0)
    clock(60)
    told.tell("images", 0.25, 3 * 60)
    assert lines(capsys) == ["images, 25%, 3 min left, 11 min with the steps that follow"]


def test_verification_says_what_it_is_at_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ByteProgress() as told:
        told("decoder weights", 10, 10)
        for part in range(4):
            told("verify", part, 3)
    assert lines(capsys) == ["verifying, 1 of 3: the vision tower in both", "verifying, 2 of 3: the decoder's graph",
                             "verifying, 3 of 3: the decoder in PyTorch"]


def test_quantizing_counts_weights_and_leaves_out_what_an_earlier_run_did(tmp_path: Path) -> None:
    options, calls = QuantizeOptions(method="rtn"), []
    quantizer, finished = Quantizer(TINY, tmp_path / "q", options), Part("mlp", 0)
    quantizer.quantize_part(finished)
    quantize_checkpoint(TINY, tmp_path / "q", options, lambda *call: calls.append(call))
    weights = {module: math.prod(shape) for module, shape in matrices(quantizer.source.config).items()
               if quantizer.schemes[module] is not None}
    earlier = sum(count for module, count in weights.items() if part_of(module + ".weight") == finished)
    done = [done for _, done, _ in calls]
    assert {module for module, _, _ in calls} == {
        module for module in weights if part_of(module + ".weight") != finished}
    assert done == sorted(set(done)) and done[-1] == calls[0][2] == sum(weights.values())
    assert max(later - sooner for sooner, later in pairwise(done)) >= earlier, "told with the first matrix behind them"


def test_the_steps_of_a_plan_are_its_time() -> None:
    plan = plan_quantization(TINY, QuantizeOptions(method="rtn"), Extent(1000, 500, 4), kept_bytes=2)
    assert all(seconds > 0 for seconds in plan.steps.values()) and sum(plan.steps.values()) == plan.seconds
    assert plan.later("images") * plan.steps["images"] == pytest.approx(plan.seconds - plan.steps["images"])
    assert plan.later("exporting") == 0
    assert plan.to_dict()["seconds"] == plan.seconds and "disk about" in plan.describe()
    alone = plan_quantization(TINY, QuantizeOptions(method="rtn"), Extent())
    assert alone.steps["images"] == alone.steps["exporting"] == 0 and alone.disk_bytes == alone.total_bytes


def test_a_disk_too_small_for_the_whole_job_is_refused_before_any_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    code = run_command(cli, "vl2", ["export", str(TINY), "--scheme", "int4", "--samples", "1", "--out",
                                    str(tmp_path / "b")])
    assert code == 1 and "GB free, and making b takes about" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []

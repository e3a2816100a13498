"""The budget that a target leaves for a bundle."""

from dataclasses import replace
from pathlib import Path

import pytest

from vl2.cli import cli, run_command
from vl2.errors import VL2Error
from vl2.planning import room
from vl2.planning.demand import Demand
from vl2.planning.models import planned_model
from vl2.planning.plan import Situation, make_plan
from vl2.planning.room import bundle_room
from vl2.planning.schemes import Choice
from vl2.planning.targets import read_targets

TARGETS = read_targets()
NANO = Path(__file__).parents[2] / "nano" / "checkpoint"


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_a_bundle_of_that_size_fits_as_the_plan_counts(name: str, scheme: str) -> None:
    """A target made so that this scheme just fits has room for its bundle, and hardly more."""
    model, choice = planned_model(name), Choice(scheme, "int8", "int8", "int8")
    plan = make_plan(Situation(model, Demand(((4096, 4096),)), "cpu", TARGETS["cpu"]), choice)
    exact = replace(TARGETS["cpu"], usable_share=1.0, memory_gib=plan.runs["cpu"].memory.peak / 2**30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "read_targets", lambda: {"exact": exact})
        found = bundle_room(name, "exact")
    assert plan.storage.total_bytes * 0.999 <= found <= plan.storage.total_bytes * 1.001


def test_a_narrow_cache_leaves_more_room_and_a_full_target_says_so() -> None:
    assert bundle_room("tiny", "orin-nano-8gb", kv_cache="int8") > bundle_room("tiny", "orin-nano-8gb") + 350e6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "read_targets", lambda: {"full": replace(TARGETS["cpu"], memory_gib=0.5)})
        with pytest.raises(VL2Error, match="full has .* GB for a run, which cache"):
            bundle_room("tiny", "full")


def test_a_target_excludes_a_scheme_and_a_budget(tmp_path: Path) -> None:
    for options in (("--scheme", "int4"), ("--budget", "1GB"), ("--no-calib",)):
        assert run_command(cli, "vl2", ["export", str(NANO), "--out", str(tmp_path / "b"), "--target", "cpu",
                                        *options]) == 2
    assert run_command(cli, "vl2", ["export", str(NANO), "--out", str(tmp_path / "b"), "--target", "toaster"]) == 1


def test_a_bundle_for_a_device_gets_the_devices_lowering(monkeypatch, tmp_path: Path, capsys) -> None:
    """Not that of the machine that exports: a CPU's bundle does not run on a GPU, and on a board ort's is slow."""
    for target, lowering in (("orin-nano-8gb", "cpu"), ("rtx-4060", "ort")):
        assert room.lowering_for(target) == lowering
        run_command(cli, "vl2", ["export", str(NANO), "--dry-run", "--target", target, "--method", "rtn"])
        assert f"lowering {lowering}" in capsys.readouterr().err


def test_engines_have_room_by_their_own_memory() -> None:
    room = bundle_room("tiny", "orin-nano-8gb", "trt")
    assert 3e9 < room < 7e9 and room != bundle_room("tiny", "orin-nano-8gb", "cpu")
    with pytest.raises(VL2Error, match="raspberry-pi-5 runs cpu, and no TensorRT engines"):
        bundle_room("tiny", "raspberry-pi-5", "trt")

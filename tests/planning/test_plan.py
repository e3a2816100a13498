"""What a plan says: tiles by the runtime's rule, whether it fits, changes that really make it fit."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import GOLDENS, NANO
from vl2.errors import VL2Error
from vl2.image import image_token_count, preprocess
from vl2.planning.backends import on_engines
from vl2.planning.demand import Demand, prompt_size
from vl2.planning.memory import IMAGE_CACHE_BYTES, SERVER_BYTES
from vl2.planning.models import NAMES, planned_model
from vl2.planning.plan import LADDER, Plan, Situation, make_plan
from vl2.planning.schemes import Choice, form_of_checkpoint, storage_of
from vl2.planning.speed import estimate_speed, prefill_operations, tile_operations
from vl2.planning.targets import Target, read_targets
from vl2.planning.text import describe, describe_targets
from vl2.quantization import Form, QuantizationConfig
from vl2.runtime.options import BundleOptions

TARGETS = read_targets()


def plan_for(name: str, target: str, demand: Demand | None = None, choice: Choice | None = None) -> Plan:
    return make_plan(Situation(planned_model(name), demand or Demand(((1920, 1080),)), target, TARGETS[target]), choice)


def vl2(*arguments: object) -> subprocess.CompletedProcess:
    code = "import sys; from vl2.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("sizes", [[(1920, 1080)], [(640, 480), (300, 2000)], [(9, 9), (1920, 1080), (50, 900)]])
@pytest.mark.parametrize("limit", [None, 2])
def test_tiles_and_tokens_are_those_of_the_image_processor(sizes: list, limit: int | None) -> None:
    model = planned_model("tiny")
    size = prompt_size(model, Demand(tuple(sizes), max_tiles=limit))
    geometry = model.geometry.with_max_tiles(limit)
    cut = preprocess([Image.new("RGB", each) for each in sizes], geometry)
    assert size.tiles == len(cut.tiles) and [list(crop) for crop in size.crops] == cut.crops.tolist()
    assert size.image_tokens == sum(image_token_count(crop, geometry) for crop in cut.crops)


@pytest.mark.parametrize("name, variant", [("tiny", "tiny"), ("deepseek-vl2-small", "small"),
                                           ("deepseek-ai/deepseek-vl2-tiny", "tiny"), ("deepseek-vl2", "base"),
                                           ("deepseek-ai/deepseek-vl2", "base")])
def test_published_models_have_their_short_names_and_hub_ids(name: str, variant: str) -> None:
    model = planned_model(name)
    assert model.config.variant == variant and model.name == NAMES[variant]


def test_something_else_is_refused_with_the_names(tmp_path: Path) -> None:
    for name in ("huge", str(tmp_path)):
        with pytest.raises(VL2Error) as error:
            planned_model(name)
        assert "tiny" in error.value.hint


def test_the_scheme_that_keeps_most_and_fits_is_taken() -> None:
    plan = plan_for("tiny", "orin-nano-8gb")
    assert plan.fits and plan.options == "--scheme int8" and not plan.changes
    peaks = [row[1] for row in plan.schemes.values()]
    assert peaks[0] == max(peaks) and list(plan.schemes) == [choice.options for choice in LADDER]
    assert plan_for("tiny", "rtx-4090").options == "--scheme fp16"


def test_what_does_not_fit_says_changes_that_fit() -> None:
    plan = plan_for("tiny", "orin-nano-8gb", choice=Choice("fp16"))
    assert not plan.fits and plan.changes
    scheme = next(change for change in plan.changes if change.startswith("--scheme int8: peak"))
    assert plan_for("tiny", "orin-nano-8gb", choice=Choice("int8")).fits and scheme
    small = plan_for("small", "rtx-4060")
    assert not small.fits and any(change.startswith("deepseek-ai/deepseek-vl2-tiny") for change in small.changes)


def test_a_shorter_context_and_a_smaller_chunk_are_offered_when_they_suffice() -> None:
    situation = Situation(planned_model("tiny"), Demand(((384, 384),)), "small", TARGETS["cpu"], "ort")
    choice = Choice("int4", "int8", "int8", "int8")
    memory = make_plan(situation, choice).runs["cpu"].memory
    tight = replace(TARGETS["cpu"], usable_share=1.0, memory_gib=(memory.peak - memory.kv_cache // 2) / 2**30)
    plan = make_plan(replace(situation, target=tight), choice)
    context = next(int(match[1]) for change in plan.changes if (match := re.match(r"--context (\d+)", change)))
    assert not plan.fits and 1900 < context < 2200
    shorter = replace(situation, target=tight, demand=replace(situation.demand, context=context))
    assert make_plan(shorter, choice).fits
    assert not make_plan(replace(shorter, demand=replace(shorter.demand, context=context + 8)), choice).fits
    tight = replace(tight, memory_gib=(memory.peak - memory.activations // 4) / 2**30)
    changes = make_plan(replace(situation, target=tight), choice).changes
    assert any("--prefill-chunk 128" in change for change in changes)


def test_a_server_takes_its_pool_on_top_and_a_smaller_one_is_offered_where_that_suffices() -> None:
    def planned(pool: int | None, target=TARGETS["orin-nano-8gb"]):
        demand = Demand(context=1024, pool_bytes=pool)
        return make_plan(Situation(planned_model("tiny"), demand, "a board", target), Choice("int8"))

    alone, served = (next(iter(planned(pool).runs.values())).memory for pool in (None, 512 << 20))
    assert alone.server == 0
    assert served.peak - alone.peak == (512 << 20) + IMAGE_CACHE_BYTES + SERVER_BYTES
    room = (alone.peak + (200 << 20)) / 2**30
    small = replace(TARGETS["orin-nano-8gb"], memory_gib=room, usable_share=1.0)
    plan = planned(512 << 20, small)
    offered = next(change for change in plan.changes if change.startswith("--serve "))
    assert not plan.fits and planned(int(offered.split()[1].removesuffix("MiB:")) << 20, small).fits


def test_a_server_s_image_cache_is_the_one_that_it_has_without_asking() -> None:
    assert BundleOptions().image_cache_bytes == IMAGE_CACHE_BYTES


def test_a_prompt_that_is_too_long_says_the_tile_budget_under_which_it_is_not() -> None:
    demand = Demand(((1152, 1152),) * 2, text_tokens=200)
    plan = plan_for("tiny", "rtx-4090", demand)
    assert not plan.fits and not plan.prompt.fits
    limit = next(int(match[1]) for change in plan.changes if (match := re.match(r"--max-tiles (\d+)", change)))
    assert plan_for("tiny", "rtx-4090", replace(demand, max_tiles=limit)).fits
    assert not prompt_size(planned_model("tiny"), replace(demand, max_tiles=9)).fits


def test_what_cannot_be_asked_for_is_refused() -> None:
    with pytest.raises(VL2Error, match="the model holds 1 to 4,096"):
        plan_for("tiny", "cpu", Demand(context=5000))
    with pytest.raises(VL2Error, match="0x10 pixels"):
        Demand(((0, 10),))


def test_a_bundle_is_planned_for_as_it_is(nano_bundle: Path) -> None:
    plan = plan_for(str(nano_bundle), "raspberry-pi-5", Demand(((224, 224),)))
    assert plan.fits and plan.options == "fp32" and plan.schemes == {}
    facts = json.loads((nano_bundle / "manifest.json").read_text())["modules"]
    assert plan.storage.modules == {name: facts[name]["size_bytes"] for name in facts}
    with pytest.raises(VL2Error, match="stored already"):
        plan_for(str(nano_bundle), "cpu", choice=Choice("int4"))
    with pytest.raises(VL2Error, match="has the lowering `portable`"):
        make_plan(replace(plan.situation, lowering="cpu"))


@pytest.mark.parametrize("lowering, targets, refused", [
    ("cpu", {"orin-nano-8gb": ["cpu"], "raspberry-pi-5": ["cpu"]}, "rtx-4060"),
    ("trt", {"orin-nano-8gb": ["engine"], "rtx-4060": ["engine"]}, "raspberry-pi-5"),
    ("portable", {"orin-nano-8gb": ["cpu"], "rtx-4060": ["cuda"]}, None),
])
def test_a_bundle_is_planned_for_what_runs_its_lowering(nano_bundle: Path, lowering: str, targets, refused) -> None:
    model = planned_model(str(nano_bundle))
    model = replace(model, storage=replace(model.storage, lowering=lowering))
    for name, backends in targets.items():
        plan = make_plan(Situation(model, Demand(()), name, TARGETS[name]))
        assert list(plan.runs) == backends
    if refused is not None:
        with pytest.raises(VL2Error, match=f"has the lowering `{lowering}`, which runs on .*, and {refused} has"):
            make_plan(Situation(model, Demand(()), refused, TARGETS[refused]))


def test_engines_hold_the_tower_in_int8_as_the_scheme_says_and_build_in_less_memory() -> None:
    weights, build = {}, {}
    for vision in ("fp16", "int8"):
        plan = plan_for("tiny", "orin-nano-8gb", Demand(((224, 224),)), Choice("int4", vision))
        weights[vision] = {name: run.memory.weights for name, run in plan.runs.items()}
        build[vision] = plan.workstation.build
    for backend in ("engine", "cpu"):
        assert weights["fp16"][backend] > weights["int8"][backend] + 400e6
    # measured: 1.2 GB less
    assert build["fp16"] > build["int8"] + 1.1e9


@pytest.mark.parametrize("form, halves", [(Form(8, None), False), (Form(8, 32), True), (Form(4, None), True)])
def test_engines_hold_a_tower_of_other_forms_in_float16(form: Form, halves: bool) -> None:
    model = planned_model("tiny")
    quantized = QuantizationConfig(((("re:vision.*",), form),))
    model = replace(model, config=replace(model.config, quantization_config=quantized))
    storage = storage_of(model.tensors, form_of_checkpoint(model.config), 2)
    parameters = sum(tensor.parameters for tensor in model.tensors if tensor.module == "vision")
    assert (on_engines(model, storage).modules["vision"] == 2 * parameters) == halves


def test_a_lowering_limits_the_schemes_and_a_quantized_checkpoint_takes_any(quantized_of) -> None:
    situation = Situation(planned_model("tiny"), Demand(), "cpu", TARGETS["cpu"], "cpu")
    plan = make_plan(situation)
    assert plan.storage.lowering == "cpu" and "--scheme fp32" not in plan.schemes
    assert plan.runs["cpu"].memory.activations < plan_for("tiny", "cpu", Demand()).runs["cpu"].memory.activations
    quantized = replace(situation, model=planned_model(str(quantized_of(NANO, "int4"))))
    assert make_plan(quantized).storage.lowering == "cpu"
    chosen = make_plan(replace(quantized, lowering=None))
    assert chosen.storage.lowering == "cpu"
    slower = make_plan(replace(quantized, lowering="ort"))
    assert slower.runs["cpu"].speed.tokens_per_second < chosen.runs["cpu"].speed.tokens_per_second
    on_gpu = replace(quantized, lowering=None, target_name="rtx-3060", target=TARGETS["rtx-3060"])
    assert make_plan(on_gpu).storage.lowering == "ort"
    with pytest.raises(VL2Error, match="is for CPUs"):
        make_plan(replace(on_gpu, lowering="cpu"))


def test_a_narrower_cache_takes_less_and_is_proposed_where_it_makes_it_fit() -> None:
    situation = Situation(planned_model("tiny"), Demand(), "cpu", TARGETS["cpu"], "cpu")
    peaks = [make_plan(replace(situation, kv_cache=each), Choice("int4")).runs["cpu"].memory.peak
             for each in (None, "fp16", "int8")]
    whole = 4096 * 12 * 2 * 10 * 128 * 4
    assert peaks[0] - peaks[1] == whole // 2 and peaks[1] > peaks[2]
    demand, choice = Demand(prefill_chunk=128), Choice("int4-g128", *["int8"] * 3)
    peak = make_plan(replace(situation, demand=demand), choice).runs["cpu"].memory.peak
    # a target that lacks 100 MB
    small = replace(TARGETS["cpu"], memory_gib=(peak - 100e6) / 2**30, usable_share=1.0)
    tight = make_plan(replace(situation, target=small, demand=demand), choice)
    assert any("--kv-cache fp16" in change for change in tight.changes)


def test_a_cache_that_the_lowering_does_not_have_is_refused(nano_bundle: Path) -> None:
    situation = Situation(planned_model("tiny"), Demand(), "cpu", TARGETS["cpu"], kv_cache="fp16")
    assert make_plan(situation, Choice("fp16")).storage.lowering == "cpu"  # as the cache needs
    with pytest.raises(VL2Error, match="whose caches are fp32"):
        make_plan(replace(situation, lowering="ort"))
    with pytest.raises(VL2Error, match="has the KV cache `fp32`, and `fp16` was asked for"):
        make_plan(replace(situation, model=planned_model(str(nano_bundle))))


def test_the_estimates_are_the_measured_rates_where_they_come_from() -> None:
    """Full-size Tiny on one thread of the reference processor, docs/results.md; the plan adds the cache's bytes."""
    model, xeon = planned_model("tiny"), Target("", "host", 24, 20, 1, ("cpu",), "", cpu_gflops=120)
    demand = Demand((), 472, context=512)
    for choice, token, prefill in ((Choice("int4", *["int8"] * 3), 0.25, 8.1), (Choice("fp16"), 0.72, 9.3)):
        lowering = "portable" if choice.scheme == "fp16" else "ort"
        plan = make_plan(Situation(model, demand, "xeon", xeon, lowering), choice)
        speed = estimate_speed(model, plan.storage, plan.prompt, xeon, "cpu")
        assert 1 / speed.tokens_per_second == pytest.approx(token, rel=0.1)
        assert speed.prefill_seconds == pytest.approx(prefill, rel=0.2)
        assert speed.tokens_per_second < speed.limit_tokens_per_second
    # shared/guide/cpu.md, section 2: 0.81 GFLOP a token without attention, 666 a tile
    assert prefill_operations(model, 1) == pytest.approx(0.81e9, rel=0.02)
    assert tile_operations(model.config) == pytest.approx(666e9, rel=0.02)


def test_the_json_holds_what_the_page_says(tmp_path: Path) -> None:
    done = vl2("plan", "base", "--target", "orin-nx-16gb", "--image", "1920x1080", "--images", 2, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert not told["fits"] and told["changes"] and told["prompt"]["tiles"] == 18
    assert told["bundle_bytes"] == sum(told["modules"].values()) and told["target"]["jetpack"] == ["6.2", "7.2"]
    page = vl2("plan", "base", "--target", "orin-nx-16gb", "--image", "1920x1080", "--images", 2).stdout
    assert "does not fit on orin-nx-16gb" in page and told["changes"][0] in page
    assert f"peak {told['runs']['cpu']['memory']['peak'] / 1e9:.2f} GB" in page


@pytest.mark.parametrize("arguments", [("plan",), ("plan", "tiny", "--image", "0x3"), ("plan", "tiny", "--images", 2),
                                       ("plan", "tiny", "--scheme", "fp16", "--head", "int8")])
def test_wrong_usage_is_said(arguments: tuple) -> None:
    done = vl2(*arguments)
    assert done.returncode == 2 and "Usage" in done.stderr


def test_every_page_can_be_written() -> None:
    for name, target in zip(("small", str(GOLDENS / "base-mini"), str(NANO)), ("thor", "cpu", "rtx-4060"), strict=True):
        assert describe(plan_for(name, target, Demand())).count("\n") > 10
    assert describe_targets(TARGETS).count("\n") == len(TARGETS)

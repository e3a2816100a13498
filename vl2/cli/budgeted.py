"""`--budget SIZE`: of all recipes that fit, the one that loses least by the measured sensitivities of its groups."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vl2.cli.progress import format_time
from vl2.cli.sensitivity import BudgetJob, measure_checkpoint, measure_groups, measurement_work
from vl2.errors import VL2Error
from vl2.json_file import read_json, to_json

if TYPE_CHECKING:
    from vl2.quant.budget import Allocation, Item
    from vl2.quant.groups import Group

_FOUND_NAME, _JOB_NAME = "sensitivity.json", "job.json"


@dataclass(frozen=True)
class BudgetPlan:
    """The sizes that recipes reach, in bytes; groups: bytes by group and option; measuring_seconds: estimated, before
    anything is quantized."""

    budget_bytes: int
    smallest_bytes: int
    largest_bytes: int
    groups: dict[str, dict[str, int]]
    measuring_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return asdict(self)

    def describe(self) -> str:
        """The plan as text for a person."""
        return (f"{len(self.groups)} groups, together {format_size(self.smallest_bytes)} to "
                f"{format_size(self.largest_bytes)}; the budget is {format_size(self.budget_bytes)}\n"
                "the recipe is chosen by measuring on the calibration data, which takes roughly "
                f"{format_time(self.measuring_seconds)} beside calibration and quantization")


def choose_recipe(job: BudgetJob, work: Path) -> tuple[Path, dict[str, Any]]:
    """A recipe file in the folder `work` and the account of how it was chosen, as quantization.json tells it.

    Sensitivities that an interrupted run measured are taken from `work`. Raises VL2Error, before anything is measured,
    naming the smallest size where nothing fits and the whole size where everything fits unquantized.
    """
    from vl2.quant.budget import allocate
    from vl2.quant.groups import decided_recipe, decision_groups
    from vl2.quant.recipe import assign_schemes
    from vl2.quant.shard import write_text
    from vl2.quant.source import Source

    source = Source(job.checkpoint)
    groups = decision_groups(source.config, job.outer)
    sizes = option_sizes(job, groups)
    _check_budget(job, _items(groups, sizes, {}), sizes["fixed"])
    write_text(work / _JOB_NAME, json.dumps(_job_identity(job), indent=1))
    found = _sensitivities(job, work, groups)
    items = _items(groups, sizes, found["klds"])
    made = allocate(items, job.budget_bytes, sizes["fixed"])
    chosen = {name: option.name for name, option in made.chosen.items()}
    recipe = decided_recipe(f"budget-{format_size(job.budget_bytes)}", groups, chosen, source.config)
    path = work / "recipe.json"
    path.write_text(json.dumps(to_json(recipe), indent=1) + "\n", encoding="utf-8")
    size = job.size_of(assign_schemes(recipe, source.config))
    how = {key: value for key, value in found.items() if key != "klds"}
    facts = {"bytes": job.budget_bytes, "predicted_bytes": size, "predicted_kld": made.kld, "gap": made.gap, **how,
             "groups": _group_facts(items, made)}
    _tell(facts)
    return path, facts


def option_sizes(job: BudgetJob, groups: Sequence[Group]) -> dict[str, Any]:
    """By group the bytes of each option; "fixed": those of everything else."""
    from vl2.quant.groups import option_schemes
    from vl2.quant.linears import matrices
    from vl2.quant.source import Source

    config, sizes = Source(job.checkpoint).config, {}
    shapes = matrices(config)
    kept = job.size_of(dict.fromkeys(shapes))
    fixed = kept
    for group in groups:
        own = 2 * sum(math.prod(shapes[module]) for module in group.members(config))
        totals = {option: job.size_of(option_schemes(group, option, config)) for option in group.options}
        sizes[group.name] = {option: total - kept + own for option, total in totals.items()}
        fixed -= own
    return {"fixed": fixed, **sizes}


def quantize_within(job: BudgetJob, out: Path, work: Path, max_ram_bytes: int | None) -> dict[str, Any]:
    """Chooses the recipe, quantizes by it to `out`, measures what was lost; returns the account (`choose_recipe`).

    work: a folder of this job's own, removed at the end; an interrupted job goes on from it. Raises VL2Error where it
    holds another's (`is_begun`).
    """
    from vl2.cli.calibrated import quantize_as_asked
    from vl2.folder_lock import work_folder
    from vl2.quant.recipe import OuterParts

    with work_folder(work, "quantization to a budget"):
        goes_on = is_begun(job, work)
        if not goes_on:
            _discard(out, work)
        recipe, facts = choose_recipe(job, work)
        if not goes_on or not _is_made(out, facts):
            options = replace(job.options, recipe=str(recipe), outer=OuterParts(), budget=facts)
            quantize_as_asked(job.checkpoint, job.calibration, out, (options, max_ram_bytes))
        facts = add_measured(job, out)
        shutil.rmtree(work)
    return facts


def is_begun(job: BudgetJob, work: Path) -> bool:
    """Whether `work` is what this very job left when it was interrupted.

    Raises VL2Error where another job left it, unless this one is forced and begins anew.
    """
    path = work / _JOB_NAME
    if not path.exists():
        return False
    if read_json(path) == _job_identity(job):
        return True
    if job.options.force:
        return False
    raise VL2Error(f"{work} was begun from another checkpoint, calibration set, budget or options",
                   "repeat the command it was begun with; or begin anew: `vl2 quantize` with --force, or without "
                   "this folder")


def _discard(out: Path, work: Path) -> None:
    """Removes what another job left here but for its sensitivities, which say themselves what they are of."""
    from vl2.folder_lock import work_folder

    if (work / _JOB_NAME).exists():
        with work_folder(partial := out.with_name(f"{out.name}.partial"), "quantization"):
            shutil.rmtree(partial)
        (work / _JOB_NAME).unlink()


def _is_made(out: Path, facts: Mapping[str, Any]) -> bool:
    """Whether `out` is the checkpoint of this account, measured or not."""
    path = out / "quantization.json"
    found = read_json(path).get("budget", {}) if path.is_file() else {}
    return {**found, **json.loads(json.dumps(facts))} == found


def plan_budget(job: BudgetJob, tokens: int) -> BudgetPlan:
    """For --dry-run; tokens: of the calibration set. Raises VL2Error as `choose_recipe` does; measures nothing."""
    from vl2.cli.plans import product_rate

    groups = _groups_of(job)
    sizes = option_sizes(job, groups)
    _check_budget(job, _items(groups, sizes, {}), fixed := sizes.pop("fixed"))
    smallest, largest = (fixed + sum(pick(options.values()) for options in sizes.values()) for pick in (min, max))
    seconds = measurement_work(job, groups, tokens) / product_rate()
    return BudgetPlan(job.budget_bytes, smallest, largest, sizes, seconds)


def is_unmeasured(out: Path) -> bool:
    """Whether a job to a budget was interrupted between the renaming of `out` and the measurement."""
    path = out / "quantization.json"
    return path.is_file() and "measured_kld" not in read_json(path).get("budget", {"measured_kld": None})


def add_measured(job: BudgetJob, quantized: Path) -> dict[str, Any]:
    """Measures a finished checkpoint, completes the account in its quantization.json and returns that account."""
    from vl2.quant.shard import write_text

    path = quantized / "quantization.json"
    facts = read_json(path)
    if "measured_kld" not in facts["budget"]:
        click.echo("measuring what was lost", err=True)
        facts["budget"] |= measure_checkpoint(job, _groups_of(job), quantized)
        write_text(path, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    budget = facts["budget"]
    click.echo(f"KLD predicted {budget['predicted_kld']:.5f}, measured {budget['measured_kld']:.5f} ± "
               f"{budget['measured_kld_error']:.5f} over {budget['text_positions']} text positions", err=True)
    return budget


def format_size(count: int) -> str:
    """Such as 2.3GB, in decimal units."""
    return f"{count / 1e9:g}GB" if count >= 1e8 else f"{count / 1e6:g}MB"


def _check_budget(job: BudgetJob, items: Sequence[Item], fixed_bytes: int) -> None:
    """Raises VL2Error where no recipe fits the budget, and where none is needed."""
    from vl2.quant.budget import allocate, refuse_needless

    allocate(items, job.budget_bytes, fixed_bytes)
    refuse_needless(items, job.budget_bytes, fixed_bytes)


def _groups_of(job: BudgetJob) -> list[Group]:
    from vl2.quant.groups import decision_groups
    from vl2.quant.source import Source

    return decision_groups(Source(job.checkpoint).config, job.outer)


def _items(groups: Sequence[Group], sizes: Mapping[str, Any], klds: Mapping[str, Mapping[str, float]]) -> list[Item]:
    from vl2.quant.budget import Item, Option

    return [Item(group.name, tuple(Option(option, sizes[group.name][option], klds.get(group.name, {}).get(option, 0.0))
                                   for option in group.options)) for group in groups]


def _group_facts(items: Sequence[Item], made: Allocation) -> list[dict[str, Any]]:
    return [{"group": item.name, "option": made.chosen[item.name].name,
             "options": {option.name: {"bytes": option.size_bytes, "kld": option.kld} for option in item.options}}
            for item in items]


def _identity(job: BudgetJob) -> dict[str, Any]:
    """What sensitivities depend on."""
    from vl2.calib.calibration_set import read_calibration_set
    from vl2.quant.source import Source

    found = read_calibration_set(job.calibration)
    return json.loads(json.dumps({"source": Source(job.checkpoint).fingerprint(), "data": found.data.sha256,
                                  "method": job.options.method, "outer": dict(job.outer),
                                  "images": job.samples is not None}))


def _job_identity(job: BudgetJob) -> dict[str, Any]:
    """What the whole job depends on."""
    return {**_identity(job), "budget": job.budget_bytes}


def _sensitivities(job: BudgetJob, work: Path, groups: list[Group]) -> dict[str, Any]:
    """As `measure_groups`; kept in `work` and taken from there where nothing that they depend on has changed."""
    from vl2.quant.shard import write_text

    path, identity = work / _FOUND_NAME, _identity(job)
    if path.exists():
        kept = read_json(path)
        if kept["identity"] == identity:
            return kept["found"]
    found = measure_groups(job, work, groups)
    write_text(path, json.dumps({"identity": identity, "found": found}, indent=1))
    return found


def _tell(facts: Mapping[str, Any]) -> None:
    counts: dict[str, int] = {}
    for group in facts["groups"]:
        kind = f"{group['group'].split(' ', 2)[-1]} {group['option']}"
        counts[kind] = counts.get(kind, 0) + 1
    click.echo(f"budget {format_size(facts['bytes'])}: {', '.join(f'{n} × {kind}' for kind, n in counts.items())}; "
               f"predicted {facts['predicted_bytes'] / 1e6:.1f} MB, KLD {facts['predicted_kld']:.5f}", err=True)
    for name in facts["unmeasured"]:
        click.echo(f"not measured: {name}, as the calibration set holds no images", err=True)

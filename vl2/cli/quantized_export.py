"""`vl2 export --scheme int4`: calibrate → quantize → export → verify as one job that can be killed and goes on.

    BUNDLE.work/
      job.json                what the folder was begun with
      calibration/            the calibration set, unless the user brought one
      NAME-SCHEME/            the quantized checkpoint, unless the user gave it a place of its own

The folder is removed when the bundle is in its place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vl2.cli.calibrated import (
    SET_MARK,
    check_job,
    explained_disk_errors,
    make_calibration_set,
    quantize_as_asked,
    read_calibration_data,
    tell_of_coverage,
    tell_of_data,
)
from vl2.cli.plans import Extent, QuantizationPlan, extent_of_data, extent_of_set, plan_quantization
from vl2.errors import VL2Error
from vl2.folder_lock import locked_folder
from vl2.json_file import from_json, read_json, to_json

if TYPE_CHECKING:
    from vl2.calib.data import CalibrationData, DataOptions
    from vl2.cli.budgeted import BudgetPlan
    from vl2.cli.sensitivity import BudgetJob
    from vl2.manifest import Manifest, Source
    from vl2.quant.quantizer import QuantizeOptions

_JOB_NAME = "job.json"


@dataclass(frozen=True)
class Budget:
    """A size for the whole bundle; outer: "fp16" or "int8" by part (OuterParts), where the user has decided."""

    size_bytes: int
    outer: Mapping[str, str]


@dataclass(frozen=True)
class QuantizedExport:
    """source: the unquantized folder; calib: data or a calibration set, None for synthetic documents; calibrated:
    False leaves calibration out; max_ram_bytes: a limit for calibration and quantization; keep: where the quantized
    checkpoint is to stay."""

    source: Path
    options: QuantizeOptions
    data: DataOptions
    calib: Path | None
    calibrated: bool = True
    max_ram_bytes: int | None = None
    budget: Budget | None = None
    keep: Path | None = None

    @property
    def has_set(self) -> bool:
        """Whether the user brought a finished calibration set."""
        return self.calib is not None and (self.calib / SET_MARK).is_file()

    def identity(self) -> dict[str, Any]:
        """What the work folder depends on, as JSON."""
        from vl2.quant.quantizer import recipe_for
        from vl2.quant.source import Source

        source = Source(self.source)
        given = None if self.calib is None else str(self.calib.resolve())
        return json.loads(json.dumps({
            "source": source.fingerprint(), "recipe": to_json(recipe_for(self.options, source.config)),
            "method": self.options.method, "data": to_json(self.data), "calib": given, "calibrated": self.calibrated,
            "budget": to_json(self.budget), "keep": None if self.keep is None else str(self.keep.resolve()),
        }))


def plan_quantized(job: QuantizedExport, export_options: Any) -> QuantizationPlan | BudgetPlan:
    """Sizes of the bundle's weights, memory and time, without the export's own; with a budget, what can be reached.

    Reads and checks the data.
    """
    extent, data = _extent(job)
    check_job(job.source, job.options, extent, job.max_ram_bytes)
    if job.budget is not None:
        from vl2.cli.budgeted import plan_budget

        return plan_budget(_budget_job(job, data, job.calib, export_options), extent.tokens)
    return plan_quantization(job.source, job.options, extent, kept_bytes=2)


def export_quantized(job: QuantizedExport, out: Path, export_options: Any) -> Manifest:
    """Makes the bundle; export_options: as `export_checkpoint` takes them, without a scheme.

    Raises VL2Error on an existing bundle before any work, on a work folder of another job, and while another process
    works there.
    """
    from vl2.export.staging import check_place

    out = out.absolute()
    check_place(out, export_options.force)
    extent, data = _extent(job)
    check_job(job.source, job.options, extent, job.max_ram_bytes)
    if job.budget is not None:
        from vl2.cli.budgeted import plan_budget

        # refused before the tower has run for an hour
        plan_budget(_budget_job(job, data, job.calib, export_options), extent.tokens)
    plan = plan_quantization(job.source, job.options, extent, kept_bytes=2)
    work = out.with_name(f"{out.name}.work")
    if not work.exists():
        if job.keep is not None:
            _check_keep(job.keep.absolute())
        _check_space(out, plan.disk_bytes)
    if job.budget is None:
        click.echo(plan.needs(), err=True)
    with explained_disk_errors(work):
        work.mkdir(exist_ok=True)
    with locked_folder(work, "quantized export"):
        _begin(work, job.identity() | _bundle_identity(job, export_options))
        manifest = _make(job, data, (work, out), (export_options, plan))
        shutil.rmtree(work)
    return manifest


def _check_space(out: Path, needed_bytes: int) -> None:
    """Raises VL2Error where the disk would be full before the bundle is whole."""
    free = shutil.disk_usage(out.parent).free
    if free < needed_bytes:
        raise VL2Error(f"{out.parent} has {free / 1e9:.2f} GB free, and making {out.name} takes about "
                       f"{needed_bytes / 1e9:.2f} GB", "free space, or give an --out on another disk")


def _bundle_identity(job: QuantizedExport, export_options: Any) -> dict[str, Any]:
    """What the sizes in a bundle depend on, which choose the recipe of a budget."""
    return {} if job.budget is None else {"lowering": export_options.lowering, "kv_cache": export_options.kv_cache}


def _check_keep(keep: Path) -> None:
    """Raises VL2Error unless a checkpoint may be written there."""
    if keep.exists():
        raise VL2Error(f"{keep} exists, and the quantized checkpoint was to be kept there",
                       "give another --keep-checkpoint, or export the checkpoint that is there")
    if not keep.parent.is_dir():
        raise VL2Error(f"there is no folder {keep.parent} to write {keep.name} into", f"mkdir -p {keep.parent}")


def _make(job: QuantizedExport, data: CalibrationData | None, places: tuple[Path, Path],
          how: tuple[Any, QuantizationPlan]) -> Manifest:
    """places: the work folder and the bundle's; how: the export's options and the plan."""
    from vl2.cli.budgeted import is_unmeasured, quantize_within
    from vl2.cli.progress import ByteProgress
    from vl2.export import export_checkpoint

    (work, out), (export_options, plan) = places, how
    later = {step: 0.0 if job.budget is not None else plan.later(step) for step in plan.steps}
    scheme = "budget" if job.budget is not None else Path(job.options.recipe).stem
    quantized = job.keep or work / f"{job.source.resolve().name}-{scheme}"
    with explained_disk_errors(work):
        if not quantized.exists() or is_unmeasured(quantized):
            calibration = _calibrate(job, data, work / "calibration", later["images"])
            click.echo("quantizing", err=True)
            if job.budget is None:
                quantize_as_asked(job.source, calibration, quantized, (job.options, job.max_ram_bytes),
                                  later["quantizing"])
            else:
                within = _budget_job(job, data, calibration, export_options)
                quantize_within(within, quantized, work / "budget", job.max_ram_bytes)
        click.echo("exporting" if not export_options.verify else "exporting and verifying", err=True)
        with ByteProgress() as progress:
            tell_of_coverage(read_json(quantized / "quantization.json").get("coverage"))
            return export_checkpoint(quantized, out, replace(export_options, source=_user_source(quantized)), progress)


def _budget_job(job: QuantizedExport, data: CalibrationData | None, calibration: Path | None, export_options: Any
                ) -> BudgetJob:
    from vl2.cli.sensitivity import BudgetJob
    from vl2.export.size import bundle_sizes
    from vl2.quant.quantization_config import form_of

    if data is None and "vision" not in job.budget.outer:
        raise VL2Error(f"the calibration set {job.calib} holds no images to measure the vision tower with",
                       "give --vision int8 or fp16, or --calib the data that the set was made from")
    sizes = bundle_sizes(job.source, export_options.lowering, export_options.kv_cache)
    return BudgetJob(job.source, calibration, job.budget.size_bytes, job.options,
                     lambda schemes: sizes({module: form_of(scheme) for module, scheme in schemes.items()}),
                     job.budget.outer, None if data is None else data.samples)


def _user_source(quantized: Path) -> Source:
    """The checkpoint that the user named, with its files' hashes; the quantized one is removed afterwards."""
    from vl2.manifest import Source

    path = quantized / "quantization.json"
    return from_json(Source, read_json(path)["source"], f"{path}: source")


def _extent(job: QuantizedExport) -> tuple[Extent, CalibrationData | None]:
    """How much is calibrated on, and the data where they are still to be embedded."""
    from vl2.calib.calibration_set import read_calibration_set

    if not job.calibrated:
        return Extent(), None
    if job.has_set:
        return extent_of_set(read_calibration_set(job.calib)), None
    data = read_calibration_data(job.source, job.calib, job.data)
    tell_of_data(data)
    return extent_of_data(data), data


def _calibrate(job: QuantizedExport, data: CalibrationData | None, out: Path, later: float) -> Path | None:
    from vl2.cli.progress import WorkProgress

    if data is None:
        return job.calib
    click.echo("calibrating: images through the vision tower", err=True)
    with WorkProgress(later) as progress:
        make_calibration_set(job.source, data, out, progress)
    return out


def _begin(work: Path, identity: dict[str, Any]) -> None:
    path = work / _JOB_NAME
    if not any(work.iterdir()):
        path.write_text(json.dumps(identity, indent=1), encoding="utf-8")
    elif not path.exists() or read_json(path) != identity:
        raise VL2Error(f"{work} was begun from another checkpoint, data or options",
                       f"repeat the command it was begun with, or remove it to begin anew: rm -r {work}")
    else:
        click.echo(f"going on in {work}", err=True)

"""`vl2 quantize`: a checkpoint in, a compressed-tensors checkpoint out."""

import json
from pathlib import Path
from typing import Any

import click

from vl2.cli.options import (
    RECIPES,
    SchemeName,
    debug_option,
    json_option,
    max_ram_option,
    quantization_options,
    to_quantize_options,
)
from vl2.errors import VL2Error


@click.command("quantize")
@click.argument("checkpoint")
@click.option("--scheme", type=SchemeName(RECIPES),
              help="What the routed experts are stored as, the other Linears of the language model are INT8; "
                   "or a recipe file.")
@click.option("--calib", type=click.Path(path_type=Path), help="A calibration set that `vl2 calibrate` made.")
@quantization_options
@click.option("--for", "target", type=click.Choice(["vllm"]),
              help="Keep to what this program can load: vision, projector, head and embeddings as they are, one form "
                   "for all Linears beside the routed experts.")
@click.option("--out", type=click.Path(path_type=Path), help="The folder to write.")
@max_ram_option
@click.option("--dry-run", is_flag=True, help="Print sizes by module, peak memory and time; write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing folder once the new one is whole.")
@json_option
@debug_option
def command(checkpoint: str, scheme: str | None, calib: Path | None, out: Path | None, max_ram: int | None,  # noqa: PLR0913
            dry_run: bool, force: bool, as_json: bool, **values: Any) -> None:
    """Quantize the weights of CHECKPOINT (a Hugging Face folder or hub id).

    An interrupted quantization goes on at the last finished layer when it is started again.
    """
    from dataclasses import replace

    from vl2.cli.calibrated import check_job, tell_of_coverage
    from vl2.cli.export import workstation_half
    from vl2.cli.plans import Extent, extent_of_set, plan_quantization

    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out'.")
    budget = values.pop("budget")
    check_budget_usage(budget, scheme, values, calib)
    folder = workstation_half().resolve_source(checkpoint, fetch=not dry_run)
    outer = {name: values[name] for name in ("vision", "head", "embeddings")}
    if budget is not None:
        values |= dict.fromkeys(outer)
    options = replace(to_quantize_options(values, scheme or "int4", calib is not None), force=force,
                      target=values.pop("target"))
    extent = Extent() if calib is None else extent_of_set(_read_set(calib))
    check_job(folder, options, extent, max_ram)
    job = None if budget is None else _budget_job((folder, calib), budget, options, outer)
    if dry_run:
        plan = plan_quantization(folder, options, extent) if job is None else _plan_budget(job, extent.tokens)
        click.echo(json.dumps(plan.to_dict(), indent=2) if as_json else plan.describe())
        return
    if out.exists() and not force and not _goes_on(job, out):
        raise VL2Error(f"{out} exists", "give another --out, or --force to replace it once the new one is whole")
    _quantize((folder, calib, out), (options, max_ram), job)
    summary = summarise(out)
    tell_of_coverage(summary["coverage"])
    if options.target is not None:
        summary["left_unquantized"] = left_unquantized(out)
        _tell_of_vllm(summary["left_unquantized"])
    click.echo(json.dumps(summary, indent=2) if as_json else _sentence(summary))


def check_budget_usage(budget: int | None, scheme: str | None, values: dict[str, Any], calib: Path | None) -> None:
    """Raises UsageError on options that a budget excludes or needs; values: those of the verb."""
    if budget is None and scheme is None:
        raise click.UsageError("Missing option '--scheme' or '--budget'.")
    if budget is None:
        return
    if scheme is not None or values.get("target") is not None:
        raise click.UsageError("--budget chooses the recipe: leave --scheme and --for out.")
    if calib is None:
        raise click.UsageError("--budget measures on calibration data: give --calib CALIB, made by vl2 calibrate.")
    if values["vision"] is None:
        raise click.UsageError("--budget: a calibration set holds no images to measure the tower with; give --vision "
                               "int8 or fp16, or use vl2 export --budget, which has them.")


def _budget_job(places: tuple[Path, Path], budget: int, options: Any, outer: dict[str, str | None]) -> Any:
    from vl2.cli.sensitivity import BudgetJob
    from vl2.quant.method import method_named
    from vl2.quant.plan import planned_file_bytes
    from vl2.quant.source import Source

    source, folds = Source(places[0]), method_named(options.method).folds
    given = {{"head": "lm_head"}.get(name, name): value for name, value in outer.items() if value is not None}
    return BudgetJob(*places, budget, options, lambda schemes: planned_file_bytes(source, schemes, folds), given)


def _goes_on(job: Any, out: Path) -> bool:
    """Whether only the measurement of a job to a budget is missing. VL2Error where another job left it."""
    from vl2.cli.budgeted import is_begun, is_unmeasured

    return job is not None and is_unmeasured(out) and is_begun(job, out.with_name(f"{out.name}.budget"))


def _plan_budget(job: Any, tokens: int) -> Any:
    from vl2.cli.budgeted import plan_budget

    return plan_budget(job, tokens)


def _quantize(places: tuple[Path, Path | None, Path], how: tuple[Any, int | None], job: Any) -> None:
    """places: checkpoint, calibration set, output; how: options and limit of memory; job: of a budget, or None."""
    from vl2.cli.calibrated import explained_disk_errors, quantize_as_asked

    folder, calib, out = places
    with explained_disk_errors(out):
        if job is None:
            quantize_as_asked(folder, calib, out, how)
            return
        from vl2.cli.budgeted import quantize_within

        quantize_within(job, out, out.with_name(f"{out.name}.budget"), how[1])


def summarise(folder: Path) -> dict[str, Any]:
    """What became of a checkpoint, from its quantization.json."""
    from vl2.json_file import read_json
    from vl2.quant.objective import signal_to_noise_db

    facts = read_json(folder / "quantization.json")
    worst = max(facts["matrices"], key=lambda matrix: matrix["relative_error"])
    leaning = sum(map(len, facts["leaning_experts"].values()))
    return {"folder": str(folder), "scheme": facts["recipe"]["name"], "method": facts["method"],
            "size_bytes": sum(facts["modules"].values()), "matrices": len(facts["matrices"]),
            "worst_matrix": worst["module"], "worst_sqnr_db": signal_to_noise_db(worst["relative_error"]),
            "leaning_experts": leaning, "coverage": facts.get("coverage"), "calibration": facts["calibration"]}


def left_unquantized(folder: Path) -> dict[str, int]:
    """Matrices by module that a quantized checkpoint has as floating-point numbers."""
    from collections import Counter

    from vl2.modules import module_of
    from vl2.quant.checkpoint import QuantizedCheckpoint

    forms = QuantizedCheckpoint(folder).forms
    return dict(Counter(module_of(f"{module}.weight") for module, form in forms.items() if form is None))


def _tell_of_vllm(left: dict[str, int]) -> None:
    counts = ", ".join(f"{module} ({count})" for module, count in left.items())
    click.echo(f"left in FP16 for vLLM, matrices: {counts}", err=True)
    click.echo("start vLLM with --dtype float16: in bfloat16 it would round the scales", err=True)


def _read_set(calib: Path) -> Any:
    from vl2.calib.calibration_set import read_calibration_set
    from vl2.cli.calibrated import SET_MARK

    if not (calib / SET_MARK).is_file():
        raise VL2Error(f"{calib} is no calibration set", f"vl2 calibrate CHECKPOINT --data {calib} --out CALIB")
    return read_calibration_set(calib)


def _sentence(summary: dict[str, Any]) -> str:
    text = (f"{summary['folder']}: {summary['scheme']} by {summary['method']}, {summary['size_bytes'] / 1e9:.3f} GB, "
            f"{summary['matrices']} matrices, worst SQNR {summary['worst_sqnr_db']:.1f} dB at "
            f"{summary['worst_matrix']}")
    if summary["leaning_experts"]:
        text += f"; {summary['leaning_experts']} experts leaned on their layer's statistics"
    return text

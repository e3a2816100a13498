"""`vl2 export`: a checkpoint in, a bundle out."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from click.core import ParameterSource

from vl2.cli.options import (
    RECIPES,
    SchemeName,
    debug_option,
    json_option,
    max_ram_option,
    outer_parts,
    quantization_options,
    sampling_options,
    to_data_options,
    to_quantize_options,
)
from vl2.errors import VL2Error

_PLAIN = ("fp32", "fp16")
_CALIB_HELP = ("Calibration data for an integer scheme: a folder of images, JSON lines, LLaVA JSON, VLMEvalKit TSV, or "
               "what `vl2 calibrate` made. Without it, documents that vl2 draws, and the manifest says so.")
# Options that only an integer scheme has a use for, and how they are called.
_OF_QUANTIZATION = {"calib": "--calib", "no_calib": "--no-calib", "method": "--method", "vision": "--vision",
                    "head": "--head", "embeddings": "--embeddings", "budget": "--budget", "max_ram": "--max-ram",
                    "keep_checkpoint": "--keep-checkpoint"}
_OF_CALIBRATION = {name: f"--{name}" for name in ("samples", "tokens", "tolerate", "seed")}  # these have defaults


@click.command("export")
@click.argument("checkpoint")
@click.option("--out", type=click.Path(path_type=Path), help="The bundle folder to write.")
@click.option("--scheme", type=SchemeName((*_PLAIN, *RECIPES)),
              help="How weights are stored; activations are float32 in all. fp16 without it, and of a quantized "
                   "checkpoint its own codes. int4: routed experts INT4, the other Linears of the decoder INT8.")
@click.option("--calib", type=click.Path(path_type=Path), help=_CALIB_HELP)
@click.option("--no-calib", is_flag=True, help="Quantize without calibration.")
@quantization_options
@sampling_options
@click.option("--lowering", type=click.Choice(["ort", "cpu", "portable", "trt"]),
              help="cpu: vl2's operator library, for CPUs, the default for packed weights; ort: onnxruntime's own "
                   "operators for them, the default where CUDA is offered or the library was not built; portable: "
                   "standard ONNX, the default for all else; trt: what `vl2 engine` builds TensorRT engines of.")
@click.option("--kv-cache", type=click.Choice(["fp32", "fp16", "int8"]),
              help="How keys and values (or latents) are kept while a bundle runs, fp32 without it; fp16 and int8 take "
                   "less memory a token and need --lowering cpu. `vl2 compare` says what it costs.")
@click.option("--mode", type=click.Choice(["exact", "fast"]), help="Of the lowering cpu; exact without it. fast rounds "
              "activations to INT8 before products with packed weights: quicker prompts and images, and an error.")
@click.option("--keep-checkpoint", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Where the quantized checkpoint of an integer scheme stays, for `vl2 layers` or another bundle.")
@click.option("--target", help="In place of --budget: the size that a device of `vl2 plan --list-targets` has room "
              "for, beside the cache of the model's whole context; --lowering is then the device's too.")
@click.option("--engine", metavar="NAME",
              help="Build TensorRT engines for a device of `vl2 plan --list-targets` as well, as `vl2 "
                   "engine BUNDLE --target NAME` does; --lowering is then trt.")
@max_ram_option
@click.option("--dry-run", is_flag=True, help="Print sizes by module, peak memory and time; write nothing.")
@click.option("--no-verify", is_flag=True, help="Skip the parity run; the manifest says so.")
@click.option("--force", is_flag=True, help="Replace an existing bundle once the new one is whole.")
@json_option
@debug_option
def command(checkpoint: str, out: Path | None, scheme: str | None, dry_run: bool, as_json: bool, **values: Any) -> None:
    """Turn CHECKPOINT (a Hugging Face folder or hub id) into a bundle.

    An integer scheme calibrates, quantizes, exports and verifies. An interrupted export goes on at the last finished
    layer or graph when it is started again.
    """
    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out'.")
    target, engine = values.pop("target"), values.pop("engine")
    _check_usage(scheme, values, target)
    _choose_engine(values, engine)
    export = workstation_half()
    source = export.resolve_source(checkpoint, fetch=not dry_run)
    if target is not None:
        values["budget"] = _room(source, target, values)
    scheme = "int4" if values["budget"] is not None else scheme
    options = export.ExportOptions(scheme=scheme if scheme in _PLAIN else None, verify=not values.pop("no_verify"),
                                   force=values.pop("force"), lowering=values.pop("lowering"),
                                   kv_cache=values.pop("kv_cache"), mode=values.pop("mode"))
    if scheme is None or scheme in _PLAIN:
        plan, make = lambda: export.plan_export(source, options), lambda: _export(export, source, out, options)
    else:
        from vl2.cli.quantized_export import export_quantized, plan_quantized

        job = _quantized_job(source, scheme, values)
        plan, make = lambda: plan_quantized(job, options), lambda: export_quantized(job, out, options)
    if dry_run:
        made = plan()
        click.echo(json.dumps(made.to_dict(), indent=2) if as_json else made.describe())
        return
    summary = _summary(out, make())
    try:
        if engine is not None:
            summary["engine"] = _engines(out, engine)
    finally:  # the bundle is whole, whatever became of the engines
        click.echo(json.dumps(summary, indent=2) if as_json else _sentence(summary))


def workstation_half() -> ModuleType:
    """The module `vl2.export`; tells how to install what it needs where torch or onnx is missing."""
    try:
        return importlib.import_module("vl2.export")
    except ModuleNotFoundError as error:
        raise VL2Error(f"exporting needs the Python package `{error.name}`, which is not installed",
                       hint="pip install '.[export]' in vl2's folder; a device that runs bundles needs none "
                            "of it") from error


def _room(source: Path, target: str, values: dict[str, Any]) -> int:
    from vl2.planning.room import bundle_room, lowering_for

    values["lowering"] = values["lowering"] or lowering_for(target)
    room = bundle_room(str(source), target, values["lowering"], values["kv_cache"])
    click.echo(f"{target}: room for a bundle of {room / 1e9:.2f} GB, lowering {values['lowering']}", err=True)
    return room


def _choose_engine(values: dict[str, Any], engine: str | None) -> None:
    """Before any work: whether the target takes engines, and the lowering that they are built of."""
    if engine is None:
        return
    from vl2.cli.engine import check_target

    if values["lowering"] not in (None, "trt"):
        raise click.UsageError(f"--engine is built of the lowering trt, and --lowering {values['lowering']} was given.")
    check_target(engine)
    values["lowering"] = "trt"


def _engines(bundle: Path, target: str) -> dict[str, Any]:
    """With the options that `vl2 engine` has of itself."""
    from vl2.cli import engine

    context = engine.command.make_context("engine", [str(bundle), "--target", target])
    return engine.make_engines(bundle, context.params)


def _check_usage(scheme: str | None, values: dict[str, Any], target: str | None) -> None:
    source = click.get_current_context().get_parameter_source
    sampling = [name for key, name in _OF_CALIBRATION.items() if source(key) is ParameterSource.COMMANDLINE]
    if sampling and values["calib"] and _is_calibration_set(values["calib"]):
        raise click.UsageError(f"{', '.join(sampling)}: {values['calib']} is a calibration set, which was sampled when "
                               "it was made.")
    if values["budget"] is not None and target is not None:
        raise click.UsageError("--budget and --target exclude each other.")
    if values["budget"] is not None or target is not None:
        _check_budget(scheme, values)
        return
    given = [name for key, name in _OF_QUANTIZATION.items() if values[key]] + sampling
    if given and (scheme is None or scheme in _PLAIN):
        raise click.UsageError(f"{', '.join(given)}: only with an integer scheme, such as --scheme int4.")
    if values["calib"] and values["no_calib"]:
        raise click.UsageError("--calib and --no-calib exclude each other.")
    if values["no_calib"] and sampling:
        raise click.UsageError(f"{', '.join(sampling)}: nothing is sampled with --no-calib.")


def _is_calibration_set(calib: Path) -> bool:
    from vl2.cli.calibrated import SET_MARK

    return (calib / SET_MARK).is_file()


def _check_budget(scheme: str | None, values: dict[str, Any]) -> None:
    if scheme is not None:
        raise click.UsageError("--budget and --target choose the recipe: leave --scheme out.")
    if values["no_calib"]:
        raise click.UsageError("--budget and --target measure on calibration data: leave --no-calib out.")


def _export(export: ModuleType, source: Path, out: Path, options: Any) -> Any:
    from vl2.cli.progress import ByteProgress

    with ByteProgress() as progress:
        return export.export_checkpoint(source, out, options, progress)


def _quantized_job(source: Path, scheme: str, values: dict[str, Any]) -> Any:
    from vl2.cli.quantized_export import Budget, QuantizedExport

    calibrated, budget = not values["no_calib"], None
    if values["budget"] is not None:
        budget = Budget(values["budget"], outer_parts(values))
        values |= dict.fromkeys(("vision", "head", "embeddings"))
    return QuantizedExport(source, to_quantize_options(values, scheme, calibrated), to_data_options(values),
                           values["calib"], calibrated, values["max_ram"], budget, values["keep_checkpoint"])


def _summary(out: Path, manifest: Any) -> dict[str, Any]:
    summary = {"bundle": str(out), "variant": manifest.variant, "scheme": manifest.scheme,
               "lowering": manifest.lowering, "verify": manifest.verify,
               "size_bytes": sum(file.size_bytes for file in manifest.files.values())}
    if manifest.quantization is not None:
        summary["quantization"] = manifest.quantization
    return summary


def _sentence(summary: dict[str, Any]) -> str:
    exported = (f"{summary['bundle']}: {summary['variant']} {summary['scheme']}, lowering {summary['lowering']}, "
                f"{summary['size_bytes'] / 1e9:.3f} GB, parity {summary['verify']['status']}")
    if "engine" not in summary:
        return exported
    from vl2.cli.engine import describe

    return f"{exported}\n{describe(summary['engine'])}"

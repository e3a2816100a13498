"""`vl2 export`: a checkpoint in, a bundle out."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import click

from vl2.cli.options import debug_option, json_option
from vl2.errors import VL2Error


@click.command("export")
@click.argument("checkpoint")
@click.option("--out", type=click.Path(path_type=Path), help="The bundle folder to write.")
@click.option("--scheme", type=click.Choice(["fp32", "fp16"]), default="fp16", show_default=True,
              help="How weights are stored; activations are float32 in both.")
@click.option("--dry-run", is_flag=True, help="Print graphs, sizes, peak memory and time; write nothing.")
@click.option("--no-verify", is_flag=True, help="Skip the parity run; the manifest says so.")
@click.option("--force", is_flag=True, help="Replace an existing bundle once the new one is whole.")
@json_option
@debug_option
def command(checkpoint: str, out: Path | None, scheme: str, dry_run: bool, no_verify: bool, force: bool,  # noqa: PLR0913
            as_json: bool) -> None:
    """Turn CHECKPOINT (a Hugging Face folder or hub id) into a bundle.

    An interrupted export goes on at the last finished graph when it is started again.
    """
    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out'.")
    export = workstation_half()
    source = export.resolve_source(checkpoint)
    options = export.ExportOptions(scheme=scheme, verify=not no_verify, force=force)
    if dry_run:
        plan = export.plan_export(source, options)
        click.echo(json.dumps(plan.to_dict(), indent=2) if as_json else plan.describe())
        return
    from vl2.cli.progress import ByteProgress

    with ByteProgress() as progress:
        manifest = export.export_checkpoint(source, out, options, progress)
    summary = {"bundle": str(out), "variant": manifest.variant, "scheme": manifest.scheme,
               "size_bytes": sum(file.size_bytes for file in manifest.files.values()), "verify": manifest.verify}
    click.echo(json.dumps(summary, indent=2) if as_json else _sentence(summary))


def workstation_half() -> ModuleType:
    """The module `vl2.export`; tells how to install what it needs where torch or onnx is missing."""
    try:
        return importlib.import_module("vl2.export")
    except ModuleNotFoundError as error:
        raise VL2Error(f"exporting needs the Python package `{error.name}`, which is not installed",
                       hint="pip install 'vl2-edge[export]'; a device that runs bundles needs none of it") from error


def _sentence(summary: dict) -> str:
    return (f"{summary['bundle']}: {summary['variant']} {summary['scheme']}, {summary['size_bytes'] / 1e9:.3f} GB, "
            f"parity {summary['verify']['status']}")

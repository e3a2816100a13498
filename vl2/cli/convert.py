"""`vl2 convert`: a GPTQ-format checkpoint in, a compressed-tensors checkpoint with the same codes out."""

import json
from pathlib import Path
from typing import Any

import click

from vl2.cli.options import debug_option, json_option


@click.command("convert")
@click.argument("checkpoint")
@click.option("--out", type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--dry-run", is_flag=True, help="Check the codes and print forms and size; write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing folder once the new one is whole.")
@json_option
@debug_option
def command(checkpoint: str, out: Path | None, dry_run: bool, force: bool, as_json: bool) -> None:
    """Convert CHECKPOINT (a Hugging Face folder or hub id) from GPTQ's format to compressed-tensors.

    For DeepSeek-VL2 checkpoints that GPTQModel, AutoGPTQ or AutoRound quantized: 4 or 8 bits, symmetric, no reordered
    inputs. The codes are kept, so every weight stays the same; `vl2 export` reads the result.
    """
    from vl2.cli.calibrated import explained_disk_errors
    from vl2.cli.export import workstation_half
    from vl2.cli.progress import WorkProgress

    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out'.")
    folder = workstation_half().resolve_source(checkpoint, fetch=not dry_run)
    from vl2.quant.convert import convert_checkpoint, plan_conversion

    if dry_run:
        plan = {"folder": str(folder), **plan_conversion(folder)}
        _tell(plan)
        click.echo(json.dumps(plan, indent=2) if as_json else _sentence(plan))
        return
    with explained_disk_errors(out), WorkProgress() as progress:
        made = convert_checkpoint(folder, out, lambda part, done, total: progress.tell(part, done / total), force)
    _tell(made)
    summary = {"folder": str(out), **made, "size_bytes": sum(path.stat().st_size for path in out.glob("*.safetensors"))}
    click.echo(json.dumps(summary, indent=2) if as_json else _sentence(summary))


def _tell(made: dict[str, Any]) -> None:
    """On stderr: what is written otherwise than it lay in the file."""
    if made["split_groups"]:
        click.echo(f"groups split into ones that divide the inputs: {len(made['split_groups'])} matrices, first "
                   f"{made['split_groups'][0]}", err=True)
    if made["widened"]:
        click.echo(f"stored with 8 bits, as a negative scale turns a code -8 into 8: {len(made['widened'])} matrices, "
                   f"first {made['widened'][0]}", err=True)
    if made["zero_biases"]:
        click.echo(f"left out: {len(made['zero_biases'])} biases that are all zero, first {made['zero_biases'][0]}",
                   err=True)


def _sentence(summary: dict[str, Any]) -> str:
    forms = ", ".join(f"{count} × {form}" for form, count in summary["forms"].items())
    return (f"{summary['folder']}: {summary['scheme']} by {summary['made_by']}, {summary['size_bytes'] / 1e9:.3f} GB, "
            f"codes kept ({forms})")

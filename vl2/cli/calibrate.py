"""`vl2 calibrate`: a checkpoint and images in, a calibration set and a report of the experts it reached out."""

import json
import shutil
from pathlib import Path
from typing import Any

import click

from vl2.cli.options import debug_option, json_option, max_ram_option, sampling_options, to_data_options
from vl2.errors import VL2Error

_DATA_HELP = ("A folder of images, JSON lines, LLaVA JSON or VLMEvalKit TSV; without it, documents that vl2 draws. "
              "Images of the kind that the model will meet serve best.")


@click.command("calibrate")
@click.argument("checkpoint")
@click.option("--data", type=click.Path(path_type=Path), help=_DATA_HELP)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The calibration set's folder to write.")
@sampling_options
@max_ram_option
@click.option("--plot", type=click.Path(path_type=Path), help="Draw tokens by layer and expert: .png, .svg or .pdf.")
@json_option
@debug_option
def command(checkpoint: str, data: Path | None, out: Path, max_ram: int | None, plot: Path | None,  # noqa: PLR0913
            as_json: bool, **values: Any) -> None:
    """Make a calibration set for CHECKPOINT: DATA through its vision tower, merged with the text.

    Prints how many tokens reached each expert. An interrupted calibration goes on when it is started again.
    """
    from vl2.calib.coverage import format_table, plot_heatmap, read_coverage
    from vl2.cli.export import workstation_half

    _check_place(out)
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"--plot ends in {plot.suffix!r}, expected .png, .svg or .pdf")
    folder = workstation_half().resolve_source(checkpoint)
    description = _calibrate(folder, data, out, (to_data_options(values), max_ram))
    has_experts = next(out.glob("counts_*.json"), None) is not None
    if plot is not None and has_experts:
        plot_heatmap(read_coverage(out), plot)
    if as_json:
        click.echo(json.dumps(_facts(out, description, has_experts), indent=2))
        return
    click.echo(f"{out}: {len(description.sequences)} conversations, {description.text_tokens} text and "
               f"{description.image_tokens} image tokens")
    if has_experts:
        click.echo(f"\n{format_table(read_coverage(out))}")


def _calibrate(folder: Path, path: Path | None, out: Path, limits: tuple[Any, int | None]) -> Any:
    from vl2.calib.demands import check_memory
    from vl2.calib.stream import StreamOptions
    from vl2.cli.calibrated import (
        cover,
        explained_disk_errors,
        make_calibration_set,
        read_calibration_data,
        tell_of_data,
    )
    from vl2.cli.progress import WorkProgress
    from vl2.config import load_config
    from vl2.folder_lock import work_folder

    options, max_ram = limits
    data = read_calibration_data(folder, path, options)
    tell_of_data(data)
    check_memory(load_config(folder).language_config, [sample.tokens for sample in data.samples], max_ram)
    work = out.with_name(f"{out.name}.partial")
    with explained_disk_errors(work), work_folder(work, "calibration"), WorkProgress() as progress:
        _check_place(out)  # another process may have made it since
        description = make_calibration_set(folder, data, work / "set", progress)
        cover(folder, work / "set", work / "stream", StreamOptions(max_ram_bytes=max_ram, report=progress))
        (work / "set").replace(out)
        shutil.rmtree(work)
    return description


def _check_place(out: Path) -> None:
    if out.exists():
        raise VL2Error(f"{out} exists", "give another --out, or remove it")


def _facts(out: Path, description: Any, has_experts: bool) -> dict[str, Any]:
    from vl2.calib.coverage import read_coverage, summarise
    from vl2.json_file import to_json

    return {"calibration": str(out), "conversations": len(description.sequences),
            "text_tokens": description.text_tokens, "image_tokens": description.image_tokens,
            "data": to_json(description.data),
            "coverage": [to_json(row) for row in summarise(read_coverage(out))] if has_experts else []}

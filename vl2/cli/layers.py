"""`vl2 layers`: where a quantized checkpoint lost what it lost, layer by layer."""

import shutil
from pathlib import Path
from typing import Any

import click

from vl2.cli.options import ByteSize, debug_option, json_option, sampling_options, to_data_options
from vl2.errors import VL2Error


@click.command("layers")
@click.argument("checkpoint")
@click.argument("quantized", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True,
              help="Conversations: a folder of images, JSON lines, LLaVA JSON or VLMEvalKit TSV.")
@click.option("--out", type=click.Path(path_type=Path), help="A file for the figures, which `vl2 compare --layers` "
              "takes into its report.")
@sampling_options
@click.option("--max-ram", type=ByteSize(), metavar="SIZE", help="Refuse to begin when more memory is needed, such as "
              "4GB.")
@click.option("--force", is_flag=True, help="Replace an existing file once the new one is whole.")
@json_option
@debug_option
def command(checkpoint: str, quantized: Path, data: Path, out: Path | None, max_ram: int | None,  # noqa: PLR0913
            force: bool, as_json: bool, **values: Any) -> None:
    """Tell where QUANTIZED, which `vl2 quantize` made, lost what against its CHECKPOINT.

    Both run over the data in PyTorch, one layer's weights in memory: SQNR of matrices and blocks, router choices,
    distributions. With --out an interrupted measurement goes on at the last finished layer.
    """
    from vl2.accuracy.journal import write_whole
    from vl2.accuracy.layers import layer_tables, read_layers, to_text
    from vl2.accuracy.report import markdown_page
    from vl2.cli.export import workstation_half

    if out is not None and out.exists():
        if not force:
            raise VL2Error(f"{out} exists", "give another --out, or --force to replace it")
        read_layers(out)  # nothing else is replaced
    report = _measure(workstation_half().resolve_source(checkpoint), quantized, data, (out, max_ram, values))
    if out is not None:
        write_whole(out, to_text(report))
        shutil.rmtree(_work_of(out))
    title = f"{report['quantized']['name']} against {report['reference']['name']}, layer by layer"
    click.echo(to_text(report) if as_json else markdown_page(title, layer_tables(report)), nl=False)


def _work_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _measure(folder: Path, quantized: Path, path: Path, how: tuple[Path | None, int | None, dict[str, Any]]
             ) -> dict[str, Any]:
    from vl2.cli.calibrated import explained_disk_errors, read_calibration_data
    from vl2.cli.progress import WorkProgress
    from vl2.layerwise.measure import MeasureOptions, measure_layers

    out, max_ram, values = how
    data = read_calibration_data(folder, path, to_data_options(values))
    for row in data.bad_rows:
        click.echo(f"bad row left out: {row}", err=True)
    work = None if out is None else _work_of(out)
    with explained_disk_errors(out or quantized), WorkProgress() as progress:
        return measure_layers(folder, quantized, data, MeasureOptions(work, max_ram, progress))

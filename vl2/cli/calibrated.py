"""Calibration and quantization put together: they meet in files only, and neither imports the other."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from vl2.errors import VL2Error
from vl2.folder_lock import work_folder

if TYPE_CHECKING:
    from vl2.calib.calibration_set import CalibrationSet
    from vl2.calib.data import CalibrationData, DataOptions
    from vl2.calib.progress import Report
    from vl2.calib.stream import StreamOptions
    from vl2.cli.plans import Extent
    from vl2.quant.quantizer import QuantizeOptions

SET_MARK = "calibration.json"  # what tells a calibration set from a folder of images


@dataclass(frozen=True)
class CalibratedJob:
    """calibration: the folder of a calibration set; quantize.calibration is filled in from it."""

    checkpoint: Path
    calibration: Path
    out: Path
    quantize: QuantizeOptions
    stream: StreamOptions


def read_calibration_data(checkpoint: Path, path: Path | None, options: DataOptions) -> CalibrationData:
    """As `read_data`, encoded by the checkpoint's own processor; no path: the built-in synthetic documents."""
    from vl2.calib.data import read_data
    from vl2.prompt import Processor

    return read_data(path, Processor.from_folder(checkpoint), options)


def make_calibration_set(checkpoint: Path, data: CalibrationData, out: Path, report: Report) -> CalibrationSet:
    """The calibration set at `out`, made or, where an interrupted job left it whole, read.

    Raises VL2Error when the one that is there was made from other data or another checkpoint.
    """
    from vl2.calib.calibration_set import check_source, read_calibration_set
    from vl2.calib.embed import EmbedOptions, embed_calibration

    if not out.exists():
        return embed_calibration(checkpoint, data, out, EmbedOptions(report=report))
    found = read_calibration_set(out)
    check_source(found, checkpoint)
    if found.data.sha256 != data.sha256:
        raise VL2Error(f"{out} was made from other data", f"remove {out.parent} to begin anew")
    return found


def cover(checkpoint: Path, calibration: Path, work: Path, options: StreamOptions) -> None:
    """Runs the model over a calibration set and leaves the tokens of each expert in it, `counts_*.json`."""
    from vl2.calib.stream import stream_layers

    stream_layers(checkpoint, calibration, work, None, options)
    for path in sorted(work.glob("counts_*.json")):
        path.replace(calibration / path.name)
    shutil.rmtree(work)


def quantize_calibrated(job: CalibratedJob, tell: Callable[[str, float | None], None] | None = None) -> Path:
    """Layer by layer: statistics out, quantized weights in, their outputs onward; returns the quantized checkpoint.

    tell(module, share) is called after each matrix; share: of what comes after the layers, None within these, of which
    `job.stream` reports.
    Works in `OUT.partial`; after an interruption the same call goes on at the layer that was not finished and gives the
    same bytes. Raises VL2Error as `stream_layers` and `Quantizer` do.
    """
    from vl2.calib.calibration_set import read_calibration_set
    from vl2.calib.coverage import coverage_facts, read_coverage
    from vl2.calib.stream import stream_layers
    from vl2.quant.quantizer import Quantizer

    facts = calibration_facts(read_calibration_set(job.calibration), job.stream)
    in_layers = True

    def progress(module: str, done: int, total: int) -> None:
        if tell is not None:
            tell(f"quantizing {module}", None if in_layers else done / total)

    quantizer = Quantizer(job.checkpoint, job.out, replace(job.quantize, calibration=facts), progress)
    made = stream_layers(job.checkpoint, job.calibration, quantizer.stream_dir, quantizer.quantize_layer, job.stream)
    in_layers = False
    counted = next(quantizer.stream_dir.glob("counts_*.json"), None) is not None
    coverage = coverage_facts(read_coverage(quantizer.stream_dir)) if counted else None
    return quantizer.finish(made.head_statistics, coverage, job.calibration)


def calibration_facts(found: CalibrationSet, stream: StreamOptions) -> dict[str, Any]:
    """What quantization.json says of the calibration: flat, without the paths of the user's folders."""
    return {
        "format": found.data.format, "file": None if found.data.path is None else Path(found.data.path).name,
        "sha256": found.data.sha256, "synthetic": found.data.path is None,
        "sequences": len(found.sequences), "images": sum(len(one.image_sha256) for one in found.sequences),
        "text_tokens": found.text_tokens, "image_tokens": found.image_tokens, "bad_rows": found.data.bad_rows,
        "balance": stream.statistics.balance, "token_weight": stream.statistics.token_weight,
    }


def tell_of_data(data: CalibrationData) -> None:
    """On stderr: what was read, what was bad, what was left out."""
    where = "built-in synthetic documents" if data.path is None else f"{data.path} ({data.format})"
    tokens, images = sum(s.tokens for s in data.samples), sum(s.image_tokens for s in data.samples)
    click.echo(f"calibration data: {where}, {len(data.samples)} of {data.rows} rows, {tokens - images} text and "
               f"{images} image tokens", err=True)
    for row in data.bad_rows:
        click.echo(f"bad row left out: {row}", err=True)
    for what in data.ignored:
        click.echo(f"not used: {what}", err=True)


def tell_of_coverage(coverage: Mapping[str, Any] | None) -> None:
    """On stderr, by modality: tokens that an expert got, and how many got none; coverage: quantization.json's."""
    rows = (coverage or {}).get("layers", [])
    for modality in ("text", "image"):
        of_it = [row for row in rows if row["modality"] == modality]
        without, experts = (sum(row[key] for row in of_it) for key in ("experts_without", "experts"))
        if experts:
            starved = max(of_it, key=lambda row: row["experts_without"])
            click.echo(f"{modality} tokens an expert: at least {min(row['fewest'] for row in of_it)}, median "
                       f"{median(row['median'] for row in of_it):g}; none in {without} of {experts}"
                       + (f", most in layer {starved['layer']}" if without else ""), err=True)


def check_job(checkpoint: Path, options: QuantizeOptions, extent: Extent, max_ram_bytes: int | None) -> None:
    """Raises VL2Error on a checkpoint that cannot be quantized, on a recipe that quantizes nothing, and where the work
    needs more memory than the limit."""
    from vl2.cli.plans import check_memory
    from vl2.quant.quantizer import quantizing_schemes, recipe_for
    from vl2.quant.source import Source

    config = Source(checkpoint).config
    quantizing_schemes(recipe_for(options, config), config)
    check_memory(config, options, extent, max_ram_bytes)


def quantize_as_asked(
    checkpoint: Path, calibration: Path | None, out: Path, how: tuple[QuantizeOptions, int | None], later: float = 0.0
) -> Path:
    """With the calibration set, or without one; how: the options and the limit of memory. Reports on stderr; later: as
    `WorkProgress` takes it.

    Raises VL2Error while another process quantizes to the same place.
    """
    from vl2.calib.stream import StreamOptions
    from vl2.cli.progress import WorkProgress
    from vl2.quant.quantizer import quantize_checkpoint

    options, max_ram = how
    with work_folder(out.with_name(f"{out.name}.partial"), "quantization"), WorkProgress(later) as progress:
        if calibration is None:
            return quantize_checkpoint(checkpoint, out, options,
                                       lambda module, done, total: progress.tell(module, done / total))
        stream = StreamOptions(max_ram_bytes=max_ram, report=progress)
        return quantize_calibrated(CalibratedJob(checkpoint, calibration, out, options, stream), progress.tell)


@contextmanager
def explained_disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk and missing rights into VL2Error; what was finished stays and the same command goes on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder.parent).free
            raise VL2Error(f"the disk of {folder} is full: {free / 1e9:.2f} GB are free",
                           "free space and repeat the command: it goes on where it stopped") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise VL2Error(f"{error.filename or folder} cannot be written: {error.strerror}",
                           "give another --out") from error
        raise

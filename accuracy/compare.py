"""A whole comparison, from paths to a report."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vl2.accuracy.bounds import Bounds
from vl2.accuracy.comparison import run_along
from vl2.accuracy.journal import held_place, refuse_existing
from vl2.accuracy.layers import read_layers, refuse_other_checkpoint
from vl2.accuracy.questions import DataOptions, Evaluation, read_questions, refuse_calibrated
from vl2.accuracy.record import OpenBundle, Progress, RecordOptions, record, recorded_already
from vl2.accuracy.recording import RECORDING_NAME, Recording
from vl2.accuracy.report import REPORT_NAME, write_report
from vl2.accuracy.summary import Joined, floor_figures, summarise
from vl2.errors import VL2Error
from vl2.manifest import MANIFEST_NAME, read_manifest
from vl2.runtime import Model, open_bundle


@dataclass(frozen=True)
class CompareOptions:
    """out: the folder to write, None for none; then an interrupted comparison cannot go on. force: replace `out`.
    record: how a reference bundle is recorded; a recording brings its own. calibration: a calibration set none of whose
    images may be asked about. layers: a report of `vl2 layers` on the bundle's checkpoint, to be joined. floor: a
    bundle of the reference's weights stored otherwise, such as fp32 for fp16: what it loses is noise."""

    out: Path | None = None
    force: bool = False
    data: DataOptions = field(default_factory=DataOptions)
    record: RecordOptions = field(default_factory=RecordOptions)
    bounds: Bounds = field(default_factory=Bounds)
    calibration: Path | None = None
    layers: Path | None = None
    floor: Path | None = None


@dataclass(frozen=True)
class Surroundings:
    """open: makes a Model of a bundle's folder; progress: of a stage; say: told what the user should know."""

    open: Callable[[Path], Model] = open_bundle
    progress: Callable[[str], Progress] = lambda stage: lambda done, total: None
    say: Callable[[str], None] = lambda message: None


def compare(reference: Path, bundle: Path, data: Path, options: CompareOptions | None = None,
            surroundings: Surroundings | None = None) -> dict[str, Any]:
    """The report on what `bundle` lost against `reference`, a recording or a bundle that is recorded first.

    The folder `options.out` gets report.json, report.md, report.html, predictions.tsv, …; an interrupted comparison
    goes on at the next question. Raises VL2Error for anything that cannot be compared, and while another process
    compares there.
    """
    options, surroundings = options or CompareOptions(), surroundings or Surroundings()
    manifest = read_manifest(bundle)  # a wrong path is told before the reference has run for hours
    layers = None if options.layers is None else read_layers(options.layers)
    if layers is not None:
        refuse_other_checkpoint(options.layers, layers, manifest)
    if options.floor is not None:
        read_manifest(options.floor)
    with _place(options) as place:
        recording = _recording(reference, data, options, place, surroundings)
        floor = _floor(recording, data, options, place, surroundings)
        candidate = OpenBundle(bundle, surroundings.open(bundle))
        questions = _questions(data, candidate, options)
        for row in questions.bad_rows:
            surroundings.say(f"bad row: {row}")
        comparison, journal = run_along(recording, candidate, questions, place, surroundings.progress("comparing"))
        report = summarise(comparison, options.bounds, Joined(layers, floor))
        if options.out is not None:
            for missing in write_report(journal.folder, report, comparison):
                surroundings.say(missing)
            if recording.folder == _own_recording(place):
                shutil.rmtree(journal.folder / "reference", ignore_errors=True)
                os.rename(recording.folder, journal.folder / "reference")
            journal.publish()
            shutil.rmtree(_floor_place(place), ignore_errors=True)
    return report


@contextmanager
def _place(options: CompareOptions) -> Iterator[Path]:
    """Where the work belongs: `options.out`, or a place in a temporary folder."""
    if options.out is not None:
        with held_place(options.out, "comparison"):
            refuse_existing(options.out, options.force, REPORT_NAME)
            yield options.out
        return
    with tempfile.TemporaryDirectory(prefix="vl2-compare-") as folder:
        yield Path(folder) / "report"


def _own_recording(place: Path) -> Path:
    return place.parent / f".{place.name}.reference"


def _recording(
    reference: Path, data: Path, options: CompareOptions, place: Path, surroundings: Surroundings
) -> Recording:
    if (reference / RECORDING_NAME).is_file():
        return Recording(reference)
    if not (reference / MANIFEST_NAME).is_file():
        raise VL2Error(f"{reference} is neither a bundle nor a recording",
                       "give a folder written by `vl2 export` or `vl2 record`")
    opened = OpenBundle(reference, surroundings.open(reference))
    questions = _questions(data, opened, options)
    own = _own_recording(place)
    if found := recorded_already(own, opened, questions, options.record):
        return found
    forced = RecordOptions(options.record.walk, options.record.top, force=True)
    return record(opened, questions, own, forced, surroundings.progress("recording the reference"))


def _floor_place(place: Path) -> Path:
    return place.parent / f".{place.name}.floor"


def _floor(recording: Recording, data: Path, options: CompareOptions, place: Path, surroundings: Surroundings
           ) -> dict[str, Any] | None:
    """What the floor bundle's logits are away from the recording; its rows are kept until the report is written."""
    if options.floor is None:
        return None
    opened = OpenBundle(options.floor, surroundings.open(options.floor))
    found, _ = run_along(recording, opened, _questions(data, opened, options), _floor_place(place) / "rows",
                         surroundings.progress("measuring the noise floor"))
    return floor_figures(found)


def _questions(data: Path, bundle: OpenBundle, options: CompareOptions) -> Evaluation:
    """What is asked, refused before the long work where the comparison could not say what it is to say."""
    found = read_questions(data, bundle.model.engine.processor, options.data)
    if options.calibration is not None:
        refuse_calibrated(found, options.calibration)
    if options.bounds.min_recovery is not None and not any(question.answers for question in found.questions):
        raise VL2Error(f"--min-recovery was given, but no row of {data} has an answer to score against",
                       "give data whose rows have answers, or leave the bound out")
    return found

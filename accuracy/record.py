"""Records a reference bundle once, so that bundles can be compared with it where it does not fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vl2 import __version__
from vl2.accuracy.journal import Journal, held_place, refuse_existing
from vl2.accuracy.logits import keep, log_softmax
from vl2.accuracy.questions import Evaluation, Question
from vl2.accuracy.recording import (
    POSITIONS_NAME,
    RECORDING_NAME,
    SCHEMA_VERSION,
    BundleFacts,
    RecordedRow,
    Recording,
    RecordingFacts,
    append_positions,
    cut_positions,
    position_dtype,
    row_to_json,
    to_entry,
    write_facts,
)
from vl2.accuracy.walk import KINDS, Position, Reply, Walk, WalkOptions
from vl2.errors import VL2Error
from vl2.file_hashes import sha256_of
from vl2.json_file import to_json
from vl2.manifest import MANIFEST_NAME
from vl2.runtime import Model
from vl2.runtime.engine import Context

# (questions done, of all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RecordOptions:
    """walk: how answers are made; top: tokens kept a position, the vocabulary's size or more for all."""

    walk: WalkOptions = field(default_factory=WalkOptions)
    top: int = 1024
    force: bool = False


@dataclass(frozen=True)
class OpenBundle:
    """A bundle with the folder it was opened from."""

    folder: Path
    model: Model


def record(bundle: OpenBundle, data: Evaluation, out: Path, options: RecordOptions,
           progress: Progress = lambda done, total: None) -> Recording:
    """Asks every question of `data` and writes the recording `out`.

    Works in the hidden folder `.NAME.partial` beside it and goes on there after an interruption, when bundle,
    questions, options, backend and vl2 are the same. Raises VL2Error when `out` exists and `force` is not set, and
    while another process records there.
    """
    with held_place(out, "recording"):
        refuse_existing(out, options.force, RECORDING_NAME)
        _record(bundle, data, out, options, progress)
    return Recording(out)


def _record(bundle: OpenBundle, data: Evaluation, out: Path, options: RecordOptions, progress: Progress) -> None:
    facts, start = bundle_facts(bundle), time.monotonic()
    journal, dtype = Journal(out, _job(facts, data, options)), position_dtype(options.top, facts.vocab_size)
    path = journal.folder / POSITIONS_NAME
    cut_positions(path, journal.rows, dtype)
    context = Context(bundle.model.engine)
    for done, question in enumerate(data.questions):
        progress(done, len(data.questions))
        if done >= len(journal.rows):
            with naming(question):
                reply, entries = _answer(walk_of(context, bundle, question, options.walk), options.top, dtype)
            append_positions(path, entries)
            journal.append(row_to_json(question.sample.source, question.sha256, reply, len(entries)))
    progress(len(data.questions), len(data.questions))
    kinds = np.memmap(path, dtype, "r")["kind"]
    write_facts(journal.folder, RecordingFacts(
        schema_version=SCHEMA_VERSION, vl2_version=__version__, bundle=facts, data=data.path, data_sha256=data.sha256,
        rows=len(journal.rows), **to_json(options.walk), top=min(options.top, facts.vocab_size),
        positions={name: int((kinds == kind).sum()) for name, kind in KINDS.items()},
        seconds=round(time.monotonic() - start, 1)))
    journal.publish()


def _job(facts: BundleFacts, data: Evaluation, options: RecordOptions) -> dict[str, Any]:
    return {**facts.identity(), "vl2": __version__, "data": data.sha256, **to_json(options.walk),
            "top": min(options.top, facts.vocab_size)}


def recorded_already(folder: Path, bundle: OpenBundle, data: Evaluation, options: RecordOptions) -> Recording | None:
    """The recording in `folder` if it is the one that `record` would make."""
    if not (folder / RECORDING_NAME).is_file():
        return None
    found = Recording(folder)
    facts = to_json(found.facts)
    job = {**found.facts.bundle.identity(), "vl2": found.facts.vl2_version, "data": found.facts.data_sha256,
           **{name: facts[name] for name in (*to_json(options.walk), "top")}}
    return found if job == _job(bundle_facts(bundle), data, options) else None


def _answer(walk: Walk, top: int, dtype: np.dtype) -> tuple[Reply, np.ndarray]:
    """The greedy answer and [positions] entries of what was seen."""
    entries: list[np.ndarray] = []

    def see(position: Position) -> None:
        log_p = float(log_softmax(position.logits)[position.target])
        entries.append(to_entry(position, keep(position.logits, top), log_p, dtype))

    return walk.greedy(see), np.concatenate(entries)


def walk_of(context: Context, bundle: OpenBundle, question: Question, options: WalkOptions) -> Walk:
    """A question laid out for a bundle."""
    return Walk(context, bundle.model, question.conversation(), options)


@contextmanager
def naming(question: Question) -> Iterator[None]:
    """Puts the question's row before the message of an error."""
    try:
        yield
    except VL2Error as error:
        raise VL2Error(f"{question.sample.source}: {error.message}", error.hint) from error


def bundle_facts(bundle: OpenBundle) -> BundleFacts:
    """What a recording and a report say of a bundle."""
    manifest = bundle.model.manifest
    tokenizer = manifest.files.get("tokenizer.json")
    return BundleFacts(
        path=str(bundle.folder), variant=manifest.variant, scheme=manifest.scheme, lowering=manifest.operators,
        quantization=manifest.quantization, source=manifest.source.name,
        manifest_sha256=sha256_of(bundle.folder / MANIFEST_NAME),
        tokenizer_sha256=tokenizer.sha256 if tokenizer else "", vocab_size=manifest.language.vocab_size,
        size_bytes=sum(file.size_bytes for file in manifest.files.values()), backend=bundle.model.backend)


def recorded_rows(recording: Recording, data: Evaluation) -> list[RecordedRow]:
    """The recorded row of each question; a recording may hold more. Raises VL2Error at the first that is missing."""
    by_question = {row.sha256: row for row in recording.rows}
    for question in data.questions:
        if question.sha256 not in by_question:
            raise VL2Error(f"{question.sample.source}: the recording {recording.folder} has no such question on such "
                           "images", "compare on the data that was recorded, or record again")
    return [by_question[question.sha256] for question in data.questions]

"""Runs a bundle along a recording: how far its logits are at each position, and what it answers by itself."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vl2 import __version__
from vl2.accuracy.journal import Journal
from vl2.accuracy.logits import divergence, log_softmax
from vl2.accuracy.questions import Evaluation
from vl2.accuracy.record import OpenBundle, Progress, bundle_facts, naming, recorded_rows, walk_of
from vl2.accuracy.recording import BundleFacts, RecordedPosition, RecordedRow, Recording, reply_from_json
from vl2.accuracy.walk import Position, Reply, Walk, WalkOptions
from vl2.errors import VL2Error
from vl2.runtime.engine import Context


@dataclass(frozen=True)
class Positions:
    """A column a figure, [n] for the seen positions of all rows. kind: ANSWER or TEXT; kld, kld_most: nats; log_p,
    log_q: of the token that followed in the reference, float64; question: its index; cluster: its image."""

    kind: np.ndarray
    kld: np.ndarray
    kld_most: np.ndarray
    same_top1: np.ndarray
    log_p: np.ndarray
    log_q: np.ndarray
    question: np.ndarray
    cluster: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """All that was measured, before any figure is made of it. replies: a pair (reference, candidate) a question."""

    recording: Recording
    candidate: BundleFacts
    data: Evaluation
    replies: tuple[tuple[Reply, Reply], ...]
    positions: Positions
    seconds: float


def run_along(recording: Recording, bundle: OpenBundle, data: Evaluation, out: Path,
              progress: Progress = lambda done, total: None) -> tuple[Comparison, Journal]:
    """Compares a bundle with a recording, question by question; the journal's folder is to become `out`.

    The caller holds `out` (`held_place`). Goes on behind the last finished question of an interrupted run. Raises
    VL2Error when the data are not the recording's, or the bundle has other tokens than the reference.
    """
    facts, start = bundle_facts(bundle), time.monotonic()
    _check_vocabulary(recording, facts)
    rows, options = recorded_rows(recording, data), recording.facts
    walk_options = WalkOptions(options.max_new_tokens, options.prompt_text, options.prefill_chunk)
    job = {**facts.identity(), "vl2": __version__, "recording": asdict(options), "data": data.sha256}
    journal, context = Journal(out, job), Context(bundle.model.engine)
    for done, (question, row) in enumerate(zip(data.questions, rows, strict=True)):
        progress(done, len(data.questions))
        if done >= len(journal.rows):
            with naming(question):
                walk = walk_of(context, bundle, question, walk_options)
                journal.append(_compared(walk, row, recording.positions(row)))
    progress(len(data.questions), len(data.questions))
    replies = tuple((row.reply, reply_from_json(found)) for row, found in zip(rows, journal.rows, strict=True))
    seconds = time.monotonic() - start
    return Comparison(recording, facts, data, replies, _columns(journal.rows, data), seconds), journal


def _check_vocabulary(recording: Recording, facts: BundleFacts) -> None:
    reference = recording.facts.bundle
    for name in ("vocab_size", "tokenizer_sha256"):
        found, expected = getattr(facts, name), getattr(reference, name)
        if found != expected:
            raise VL2Error(f"{facts.path} has {name} {found}, the reference {reference.path} {expected}",
                           "only bundles of one checkpoint give distributions over the same tokens")


def _compared(walk: Walk, row: RecordedRow, recorded: list[RecordedPosition]) -> dict[str, Any]:
    """A line of the journal: the candidate's answer and a list a figure, an item a position."""
    columns: dict[str, list] = {name: [] for name in ("kind", "kld", "kld_most", "same_top1", "log_p", "log_q")}
    expected = iter(recorded)

    def see(position: Position) -> None:
        there = next(expected)
        if (there.kind, there.target) != (position.kind, position.target):
            raise VL2Error(f"token {position.target} comes where the recording has {there.target}",
                           "the bundle's tokenizer is not the reference's; record again")
        far = divergence(there.kept, position.logits)
        log_q = float(np.float32(log_softmax(position.logits)[position.target]))
        values = (there.kind, far.kld, far.kld_most, far.same_top1, there.log_p, log_q)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)

    reply = walk.along(row.reply, see)
    assert next(expected, None) is None, "the walk saw every recorded position"
    return {"text": reply.text, "token_ids": list(reply.token_ids), "stop_reason": reply.stop_reason, **columns}


def _columns(rows: list[dict[str, Any]], data: Evaluation) -> Positions:
    names = {name: index for index, name in enumerate(dict.fromkeys(question.image for question in data.questions))}
    images = np.array([names[question.image] for question in data.questions])
    question = np.repeat(np.arange(len(rows)), [len(row["kind"]) for row in rows])

    def column(name: str, kind: type) -> np.ndarray:
        return np.array([value for row in rows for value in row[name]], kind)

    return Positions(column("kind", int), column("kld", float), column("kld_most", float), column("same_top1", bool),
                     column("log_p", float), column("log_q", float), question, images[question])

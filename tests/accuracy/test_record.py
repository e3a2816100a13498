"""A recording: what it holds, how it goes on after an interruption, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.accuracy.conftest import QUESTIONS, write_questions
from vl2.accuracy import record as record_module
from vl2.accuracy.logits import keep
from vl2.accuracy.questions import DataOptions, Evaluation, read_questions
from vl2.accuracy.record import OpenBundle, RecordOptions, record, recorded_already, recorded_rows
from vl2.accuracy.recording import POSITIONS_NAME, RECORDING_NAME, Recording
from vl2.accuracy.walk import Position, Walk, WalkOptions
from vl2.errors import VL2Error
from vl2.runtime.engine import Context

OPTIONS = RecordOptions(WalkOptions(max_new_tokens=8), top=50)


@pytest.fixture
def data(reference: OpenBundle, questions_file: Path) -> Evaluation:
    return read_questions(questions_file, reference.model.engine.processor, DataOptions())


class Killed(Exception):
    """Stands for the end of the process."""


def kill_at(stop: int):
    def progress(done: int, total: int) -> None:
        if done == stop:
            raise Killed
    return progress


def test_a_recording_holds_every_answer_and_what_was_kept(reference: OpenBundle, data: Evaluation, tmp_path) -> None:
    found = record(reference, data, tmp_path / "r", OPTIONS)
    assert [row.source.rsplit(":", 1)[1] for row in found.rows] == list("12345")
    assert found.facts.top == 50 and found.facts.bundle.vocab_size == 640 and found.facts.rows == 5
    context = Context(reference.model.engine)
    for question, row in zip(data.questions, found.rows, strict=True):
        seen: list[Position] = []
        reply = Walk(context, reference.model, question.conversation(), OPTIONS.walk).greedy(seen.append)
        assert reply == row.reply and row.count == len(seen)
        for there, position in zip(found.positions(row), seen, strict=True):
            kept = keep(position.logits, 50)
            assert (there.target, there.kept.top1) == (position.target, kept.top1)
            np.testing.assert_array_equal(there.kept.ids, kept.ids)
            np.testing.assert_array_equal(there.kept.log_probs, kept.log_probs)
            assert there.log_p == there.kept.log_probs.max()
    assert sum(row.count for row in found.rows) == found.facts.positions["answer"]
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def test_with_all_tokens_kept_ids_take_no_space(reference: OpenBundle, data: Evaluation, tmp_path) -> None:
    found = record(reference, data, tmp_path / "r", replace(OPTIONS, top=5000))
    assert found.facts.top == 640 and found.positions(found.rows[0])[0].kept.ids is None
    size = (tmp_path / "r" / POSITIONS_NAME).stat().st_size
    assert size == found.facts.positions["answer"] * (5 * 4 + 640 * 4)


@pytest.mark.parametrize("stop", [1, 4])
def test_an_interrupted_recording_goes_on_at_the_next_question(
    reference: OpenBundle, data: Evaluation, tmp_path, monkeypatch, stop: int
) -> None:
    whole = record(reference, data, tmp_path / "whole", OPTIONS)
    with pytest.raises(Killed):
        record(reference, data, tmp_path / "r", OPTIONS, kill_at(stop))
    partial = tmp_path / ".r.partial"
    # What a kill in the middle of a question leaves: positions without a row, and half a line.
    with (partial / POSITIONS_NAME).open("ab") as file:
        file.write(b"x" * 1000)
    with (partial / "rows.jsonl").open("a") as file:
        file.write('{"source": "cut in th')
    asked = []
    real = record_module.walk_of
    monkeypatch.setattr(record_module, "walk_of", lambda c, b, q, o: asked.append(q.id) or real(c, b, q, o))
    again = record(reference, data, tmp_path / "r", OPTIONS)
    assert asked == list("abcde")[stop:]
    assert [row.reply for row in again.rows] == [row.reply for row in whole.rows]
    dtype = again._positions.dtype
    for name in dtype.names:
        np.testing.assert_allclose(again._positions[name], whole._positions[name], atol=2e-5)


def test_other_options_begin_anew(reference: OpenBundle, data: Evaluation, tmp_path) -> None:
    with pytest.raises(Killed):
        record(reference, data, tmp_path / "r", OPTIONS, kill_at(3))
    assert record(reference, data, tmp_path / "r", replace(OPTIONS, top=7)).facts.top == 7


def test_positions_that_were_lost_are_not_made_up(reference: OpenBundle, data: Evaluation, tmp_path) -> None:
    with pytest.raises(Killed):
        record(reference, data, tmp_path / "r", OPTIONS, kill_at(3))
    (tmp_path / ".r.partial" / POSITIONS_NAME).write_bytes(b"")
    with pytest.raises(VL2Error, match="its rows need"):
        record(reference, data, tmp_path / "r", OPTIONS)


def test_what_exists_is_replaced_only_with_force_and_only_if_it_is_a_recording(
    reference: OpenBundle, data: Evaluation, tmp_path
) -> None:
    out = tmp_path / "r"
    record(reference, data, out, OPTIONS)
    with pytest.raises(VL2Error, match="exists"):
        record(reference, data, out, OPTIONS)
    assert record(reference, data, out, replace(OPTIONS, top=3, force=True)).facts.top == 3
    (tmp_path / "holiday").mkdir()
    with pytest.raises(VL2Error, match="not written by this command"):
        record(reference, data, tmp_path / "holiday", replace(OPTIONS, force=True))


def test_a_recording_is_recognised_by_what_it_was_made_from(
    reference: OpenBundle, candidate: OpenBundle, data: Evaluation, tmp_path
) -> None:
    record(reference, data, tmp_path / "r", OPTIONS)
    assert recorded_already(tmp_path / "r", reference, data, OPTIONS)
    assert recorded_already(tmp_path / "r", candidate, data, OPTIONS) is None
    assert recorded_already(tmp_path / "r", reference, data, replace(OPTIONS, top=3)) is None
    assert recorded_already(tmp_path / "none", reference, data, OPTIONS) is None


class Elsewhere:
    """A model as another backend, or another number of threads, runs it."""

    def __init__(self, model, backend: str):
        self._model, self.backend = model, backend

    def __getattr__(self, name: str):
        return getattr(self._model, name)


def on(bundle: OpenBundle, backend: str) -> OpenBundle:
    return OpenBundle(bundle.folder, Elsewhere(bundle.model, backend))


def test_the_backend_belongs_to_a_recording_and_the_number_of_threads_does_not(
    reference: OpenBundle, data: Evaluation, tmp_path
) -> None:
    four, one, other = (on(reference, name) for name in (
        "CPU, 4 threads, onnxruntime 1.23", "CPU, 1 thread, onnxruntime 1.23", "CUDA, onnxruntime 1.23"))
    with pytest.raises(Killed):
        record(four, data, tmp_path / "r", OPTIONS, kill_at(3))
    begun = []
    record(one, data, tmp_path / "r", OPTIONS, lambda done, total: begun.append(rows_in(tmp_path / ".r.partial")))
    assert begun[0] == 3, "goes on"
    assert recorded_already(tmp_path / "r", four, data, OPTIONS)
    assert recorded_already(tmp_path / "r", other, data, OPTIONS) is None
    with pytest.raises(Killed):
        record(four, data, tmp_path / "s", OPTIONS, kill_at(3))
    begun = []
    record(other, data, tmp_path / "s", OPTIONS, lambda done, total: begun.append(rows_in(tmp_path / ".s.partial")))
    assert begun[0] == 0, "begins anew"


def rows_in(folder: Path) -> int:
    path = folder / "rows.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_another_version_of_vl2_begins_anew(reference: OpenBundle, data: Evaluation, tmp_path, monkeypatch) -> None:
    with pytest.raises(Killed):
        record(reference, data, tmp_path / "r", OPTIONS, kill_at(3))
    monkeypatch.setattr(record_module, "__version__", "99")
    begun = []
    record(reference, data, tmp_path / "r", OPTIONS, lambda done, total: begun.append(rows_in(tmp_path / ".r.partial")))
    assert begun[0] == 0
    monkeypatch.undo()
    assert recorded_already(tmp_path / "r", reference, data, OPTIONS) is None


def test_two_recordings_do_not_write_to_one_place(reference: OpenBundle, data: Evaluation, tmp_path) -> None:
    def again(done: int, total: int) -> None:
        with pytest.raises(VL2Error, match="another recording writes to"):
            record(reference, data, tmp_path / "r", OPTIONS)

    assert record(reference, data, tmp_path / "r", OPTIONS, again).facts.rows == 5


def test_a_broken_or_newer_recording_is_refused(reference: OpenBundle, data: Evaluation, tmp_path) -> None:
    record(reference, data, tmp_path / "r", OPTIONS)
    facts = tmp_path / "r" / RECORDING_NAME
    content = json.loads(facts.read_text())

    def damaged(name: str, make) -> Path:
        folder = Path(shutil.copytree(tmp_path / "r", tmp_path / name))
        make(folder)
        return folder

    cases = {
        "schema_version is 9": lambda f: (f / RECORDING_NAME).write_text(json.dumps({**content, "schema_version": 9})),
        "unknown key 'x'": lambda f: (f / RECORDING_NAME).write_text(json.dumps({**content, "x": 1})),
        "expected a multiple": lambda f: (f / POSITIONS_NAME).write_bytes(b"123"),
        "holds 4 rows": lambda f: (f / "rows.jsonl").write_text(
            "".join((f / "rows.jsonl").read_text().splitlines(keepends=True)[:4])),
    }
    for message, make in cases.items():
        with pytest.raises(VL2Error, match=message):
            Recording(damaged(message.replace(" ", "-"), make))


def test_a_question_that_was_not_recorded_is_named(
    reference: OpenBundle, data: Evaluation, questions_file: Path, tmp_path
) -> None:
    recording, processor = record(reference, data, tmp_path / "r", OPTIONS), reference.model.engine.processor

    def rows_of(name: str, *records: dict) -> list:
        path = write_questions(questions_file.parent / name, *records)
        return recorded_rows(recording, read_questions(path, processor, DataOptions()))

    with pytest.raises(VL2Error, match=r"changed\.jsonl:2: the recording .* has no such question"):
        rows_of("changed.jsonl", QUESTIONS[0], {**QUESTIONS[1], "question": "Who?"})
    with pytest.raises(VL2Error, match=r"repainted\.jsonl:1"):
        rows_of("repainted.jsonl", {**QUESTIONS[0], "image": "2.png"})
    chosen = rows_of("chosen.jsonl", QUESTIONS[3], QUESTIONS[0], QUESTIONS[3])
    assert chosen == [recording.rows[3], recording.rows[0], recording.rows[3]]

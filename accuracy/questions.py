"""The questions of an evaluation: read, checked and hashed before the first one is asked."""

from __future__ import annotations

import hashlib
import json
import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from vl2.accuracy.choices import Choices, choices_of
from vl2.accuracy.metrics import METRICS, metric_of
from vl2.accuracy.text_metrics import Score, choice
from vl2.accuracy.vqa import LEAST_ANSWERS
from vl2.data.files import image_sha256, open_rows
from vl2.data.sample import BadRow, Ignored, Row, Sample
from vl2.errors import VL2Error
from vl2.image import load_image
from vl2.json_file import read_json
from vl2.prompt import Message, Processor
from vl2.runtime.grounding import parse

_SHOWN = 5  # bad rows in an error message
_ERROR_RATES = ("cer", "wer")
_USED_FACTS = {"id", "index", "task", "metric", "boxes", "category", *string.ascii_uppercase}


@dataclass(frozen=True)
class DataOptions:
    """limit: only the first so many rows; metric: for rows that name none; tolerate: the share of bad rows above which
    nothing is run."""

    limit: int | None = None
    metric: str | None = None
    tolerate: float = 0.05


@dataclass(frozen=True)
class Question:
    """A row that can be asked. sha256: of its turns and its images' pixels; image: what it shares with other questions
    on the same images; answers: empty where the row has none, and then metric is not applied; with the metric `choice`
    they are letters, of `letters`."""

    sample: Sample
    id: str
    task: str
    metric: str
    answers: tuple[str, ...]
    sha256: str
    image: str
    letters: str = string.ascii_uppercase

    def score(self, text: str) -> Score:
        """What an answer is worth by the row's metric and answers, of which there are some."""
        if self.metric == "choice":
            return choice(text, self.answers, self.letters)
        return METRICS[self.metric].score(text, self.answers)

    def conversation(self) -> list[Message]:
        """As `Processor.lay_out` takes it, the answer left empty; earlier turns of a conversation stay as they are."""
        return [*self.sample.opened()[:-1], Message("assistant", "")]


@dataclass(frozen=True)
class Evaluation:
    """A data file's questions in its order, and the account of the rest."""

    format: str
    path: str
    questions: tuple[Question, ...]
    rows: int
    bad_rows: tuple[BadRow, ...]
    ignored: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of what is asked, in order; not of the answers, so that they may be mended."""
        return hashlib.sha256("".join(question.sha256 for question in self.questions).encode()).hexdigest()


def read_questions(path: Path, processor: Processor, options: DataOptions) -> Evaluation:
    """The questions of a JSON lines, VLMEvalKit TSV or LLaVA JSON file.

    Every image is decoded once here, so that a broken one does not stop a run after hours. Raises VL2Error for an
    unknown format, more than `tolerate` bad rows, and when nothing is left.
    """
    name, rows = open_rows(path)
    questions, bad, ignored, count = [], [], [], 0
    for row in _limited(rows, options.limit, ignored):
        count += 1
        checked = row if isinstance(row, BadRow) else _checked(row, path, processor, options)
        (bad if isinstance(checked, BadRow) else questions).append(checked)
    _refuse_too_many(path, bad, count, options.tolerate)
    return Evaluation(name, str(path), tuple(questions), count, tuple(bad), tuple(ignored))


def refuse_calibrated(data: Evaluation, calibration: Path) -> None:
    """Raises VL2Error where a question shows an image that the calibration set `calibration` was made from.

    On those a quantized model looks better than on what it will meet.
    """
    path = calibration / "calibration.json"
    sequences = read_json(path).get("sequences")
    if not isinstance(sequences, list):
        raise VL2Error(f"{path} lists no sequences", "give the folder of a calibration set")
    seen = {sha256 for sequence in sequences for sha256 in sequence["image_sha256"]}
    found = [question for question in data.questions if not seen.isdisjoint(question.image.split("+"))]
    if found:
        raise VL2Error(f"{len(found)} of {len(data.questions)} questions show an image that {calibration} was made "
                       f"from; the first is {found[0].sample.source}", "evaluate on other images")


def _limited(rows: Iterator[Row], limit: int | None, ignored: list[str]) -> Iterator[Sample | BadRow]:
    def kept() -> Iterator[Sample | BadRow]:
        for row in rows:
            if not isinstance(row, Ignored):
                yield row
            elif row.what.split()[-1].strip("'") not in _USED_FACTS:
                ignored.append(row.what)
    return islice(kept(), limit)


def _checked(sample: Sample, path: Path, processor: Processor, options: DataOptions) -> Question | BadRow:
    facts = sample.facts
    answers = (*sample.answers, *_boxes_as_text(facts.get("boxes"), sample.answers))
    task = str(facts.get("task") or facts.get("category") or path.stem)
    has_boxes = bool(answers) and all(parse(answer).boxes for answer in answers)
    metric = str(facts.get("metric") or options.metric or metric_of((task, path.stem), "A" in facts, has_boxes))
    choices = choices_of(facts, answers)
    if fault := _fault(metric, answers, choices):
        return BadRow(sample.source, fault)
    if metric == "choice":
        answers = tuple(map(choices.letter_of, answers))
    name = str(facts.get("id", facts.get("index", "")))
    question = Question(sample, name, task, metric, answers, "", "", choices.letters)
    try:
        layout = processor.lay_out(question.conversation())
        images = [image_sha256(load_image(image)) for message in sample.opened() for image in message.images]
    except VL2Error as error:
        return BadRow(sample.source, error.message)
    turns = [(message.role, message.content) for message in sample.conversation[:-1]]
    digest = hashlib.sha256(json.dumps([turns, images, len(layout.input_ids)]).encode()).hexdigest()
    return replace(question, sha256=digest, image="+".join(images) or digest)


def _fault(metric: str, answers: Sequence[str], choices: Choices) -> str | None:
    if metric not in METRICS:
        return f"its metric is {metric!r}, expected one of {', '.join(METRICS)}"
    if metric == "vqa" and 0 < len(answers) < LEAST_ANSWERS:
        return f"VQA accuracy compares with the answers of ten people, at least {LEAST_ANSWERS}; it has {len(answers)}"
    if metric == "iou" and answers and not any(parse(answer).boxes for answer in answers):
        return f"its metric is 'iou', its answer {answers[0][:40]!r} holds no box"
    if metric in _ERROR_RATES and answers and not any(unicodedata.normalize("NFKC", text).strip() for text in answers):
        return f"its metric is {metric!r}, its answer {answers[0][:40]!r} is blank: there is nothing to be wrong in"
    return choices.fault_of(answers) if metric == "choice" else None


def _boxes_as_text(boxes: Any, answers: Sequence[str]) -> list[str]:
    """The `boxes` of a row whose answer does not hold them, without labels, in the form that a model writes."""
    if not boxes or any(parse(answer).boxes for answer in answers):
        return []
    return [f"<|ref|><|/ref|><|det|>{json.dumps(boxes)}<|/det|>"]


def _refuse_too_many(path: Path, bad: list[BadRow], rows: int, tolerate: float) -> None:
    listed = "".join(f"\n{row}" for row in bad[:_SHOWN])
    if len(bad) == rows:
        raise VL2Error(f"none of {rows} rows of {path} can be used{listed}", "mend the rows, or give other data")
    if len(bad) > tolerate * rows:
        raise VL2Error(f"{len(bad)} of {rows} rows of {path} are bad, {tolerate:.0%} are tolerated{listed}",
                       "mend the rows, or tolerate more of them")

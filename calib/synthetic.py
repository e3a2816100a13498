"""Calibration data when the user brings none: documents drawn by vl2.nano, several questions each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from random import Random

from vl2.data.sample import Row, Sample
from vl2.errors import VL2Error
from vl2.nano.documents import KINDS, Document, make_document
from vl2.nano.geometry import CROPS
from vl2.nano.pages import font_folder
from vl2.prompt import IMAGE_PLACEHOLDER, Message

_QUESTIONS = 4  # of each document, in one conversation


def iter_synthetic(seed: int) -> Iterator[Row]:
    """Documents without end, the same for the same seed. Not those vl2-nano was trained or is evaluated on.

    Raises VL2Error when the fonts that they are drawn with are not installed.
    """
    try:
        font_folder()
    except VL2Error as error:
        raise VL2Error(f"no calibration data were given, and the built-in documents cannot be drawn: {error.message}",
                       f"{error.hint}, or give data of your own: a folder of images is enough") from error
    for index in count():
        rng = Random(f"calibration-{seed}-{index}")
        document = make_document(rng, rng.choice(list(KINDS)), rng.choice(CROPS))
        if document.questions:
            yield _sample(rng, document, f"synthetic:{index}")


def _sample(rng: Random, document: Document, source: str) -> Sample:
    chosen = rng.sample(document.questions, min(_QUESTIONS, len(document.questions)))
    turns = []
    for first, question in zip((True, *[False] * len(chosen)), chosen, strict=False):
        text = f"{IMAGE_PLACEHOLDER}\n{question.question}" if first else question.question
        turns.append(Message("user", text, (document.image,) if first else ()))
        turns.append(Message("assistant", question.answer))
    return Sample(tuple(turns), source)

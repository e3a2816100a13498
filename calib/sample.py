"""What every reader of calibration data yields: one conversation a row, or why a row is none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from vl2.prompt import IMAGE_PLACEHOLDER, Message

ImageSource = str | os.PathLike | Image.Image


@dataclass(frozen=True)
class Sample:
    """One conversation. It ends with an assistant message, whose content is empty where the data hold no answer."""

    conversation: tuple[Message, ...]
    source: str  # file:line

    @property
    def is_answered(self) -> bool:
        return bool(self.conversation[-1].content)


@dataclass(frozen=True)
class BadRow:
    """A row that gives no sample, and what is wrong with it."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass(frozen=True)
class Ignored:
    """What a reader passes over on purpose, named once: a field that does not matter here, files of another kind."""

    what: str


Row = Sample | BadRow | Ignored


def question_sample(source: str, question: str, images: Sequence[ImageSource], answer: str) -> Sample | BadRow:
    """A question on images as one turn; where the text has no `<image>`, the images come before it."""
    placeholders = question.count(IMAGE_PLACEHOLDER)
    if placeholders not in (0, len(images)):
        return BadRow(source, f"the question has {placeholders} {IMAGE_PLACEHOLDER}, the row {len(images)} images")
    if placeholders == 0:
        question = f"{IMAGE_PLACEHOLDER}\n" * len(images) + question
    return Sample((Message("user", question, tuple(images)), Message("assistant", answer)), source)

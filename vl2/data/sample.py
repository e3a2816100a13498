"""What every reader of data yields: one conversation a row, or why a row is none."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from vl2.prompt import IMAGE_PLACEHOLDER, Message


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of an image file. A Pillow image would keep its pixels once they were looked at, 20 times as much."""

    data: bytes

    def open(self) -> Image.Image:
        """A new Pillow image whose pixels are not decoded yet. Raises what `PIL.Image.open` does."""
        return Image.open(io.BytesIO(self.data))


ImageSource = str | os.PathLike | Image.Image | EncodedImage


@dataclass(frozen=True)
class Sample:
    """One conversation. It ends with an assistant message, whose content is empty where the data hold no answer.

    source: file:line; answers: all that the row accepts, of which the conversation holds the first; facts: the row's
    other fields by name, such as id, task, metric and boxes.
    """

    conversation: tuple[Message, ...]
    source: str
    answers: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_answered(self) -> bool:
        return bool(self.conversation[-1].content)

    def opened(self) -> list[Message]:
        """The conversation as `Processor.encode` takes it: encoded images opened anew."""
        return [replace(message, images=tuple(_opened(image) for image in message.images))
                for message in self.conversation]


def _opened(image: ImageSource) -> str | os.PathLike | Image.Image:
    return image.open() if isinstance(image, EncodedImage) else image


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


def fault_of_texts(value: Any) -> str:
    """Why the texts in a JSON value, keys included, are none: half a surrogate pair, which JSON may write as an escape
    but no tokenizer and no file takes. Empty where nothing is wrong."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"a text holds half a surrogate pair (U+{ord(error.object[error.start]):04X}), which is no character"
    except RecursionError:
        return "its JSON is nested too deeply"
    return ""


def question_sample(
    source: str, question: str, images: Sequence[ImageSource], answers: Sequence[str], facts: Mapping[str, Any]
) -> Sample | BadRow:
    """A question on images as one turn; where the text has no `<image>`, the images come before it."""
    placeholders = question.count(IMAGE_PLACEHOLDER)
    if placeholders not in (0, len(images)):
        return BadRow(source, f"the question has {placeholders} {IMAGE_PLACEHOLDER}, the row {len(images)} images")
    if placeholders == 0:
        question = f"{IMAGE_PLACEHOLDER}\n" * len(images) + question
    answer = Message("assistant", answers[0] if answers else "")
    return Sample((Message("user", question, tuple(images)), answer), source, tuple(answers), facts)

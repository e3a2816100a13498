"""What an answer is, and the stream it comes in."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vl2.errors import VL2Error
from vl2.runtime.grounding import Box

EOS, LENGTH, STOP = "eos", "length", "stop"


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    text: without end and padding tokens, up to a stop string. token_ids: as generated, without the final end token.
    prompt_tokens: of the whole conversation; reused_tokens of them were in the cache. boxes: of grounding output, in
    0…999; box_problems: what of it could not be read. image_size: (width, height) of the image the boxes refer to, the
    last one. stop_reason: "eos", "length" (max_new_tokens or the model's positions are used up) or "stop".
    load_ms: making graphs ready, in the first answers only. encode_ms: cutting images and the vision graph.
    decode_ms: all tokens after the first, which prefill gives.
    tokens_per_second: of decoding, None where nothing was decoded. peak_rss_bytes: of the process.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    reused_tokens: int
    boxes: tuple[Box, ...]
    box_problems: tuple[str, ...]
    image_size: tuple[int, int] | None
    stop_reason: str
    load_ms: float
    encode_ms: float
    prefill_ms: float
    decode_ms: float
    tokens_per_second: float | None
    peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON; each box with its pixels."""
        return {**asdict(self), "boxes": [box.to_dict(self.image_size) for box in self.boxes]}


class AnswerStream(Iterator[str]):
    """Pieces of text as they become certain; `answer` is there once they are all taken."""

    def __init__(self, pieces: Generator[str, None, Answer]):
        self._pieces = pieces
        self._answer: Answer | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._answer = end.value if self._answer is None else self._answer
            raise

    @property
    def answer(self) -> Answer:
        """The finished answer. Raises VL2Error while pieces are left."""
        if self._answer is None:
            raise VL2Error("the answer is not finished", "take all pieces of the stream first")
        return self._answer

    def read(self) -> Answer:
        """Takes what is left and returns the answer."""
        for _ in self:
            pass
        return self.answer

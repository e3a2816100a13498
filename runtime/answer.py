"""What an answer is, and the stream it comes in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vl2.errors import VL2Error
from vl2.runtime.engine import Step
from vl2.runtime.grounding import Box
from vl2.runtime.logprobs import TokenLogprob

EOS, LENGTH, STOP, LOOP = "eos", "length", "stop", "loop"


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    text: without end and padding tokens, up to a stop string. token_ids: as generated, without the final end token.
    prompt_tokens: of the whole conversation; reused_tokens of them were in the cache. boxes: of grounding output, in
    0…999; box_problems: what of it could not be read. image_size: (width, height) of the image the boxes refer to, the
    last one. stop_reason: "eos", "length" (max_new_tokens or the model's positions are used up), "stop" or "loop" (the
    repetition guard; `loop` says what repeats).
    load_ms: making graphs ready, in the first answers only. encode_ms: cutting images and the vision graph.
    decode_ms: all tokens after the first, which prefill gives.
    tokens_per_second: of decoding, None where nothing was decoded. peak_rss_bytes: of the process.
    image_cache_hits: images of the conversation for which the vision graph did not run. logprobs: one of each of
    token_ids, None where none were asked for.
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
    image_cache_hits: int = 0
    loop: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; each box with its pixels."""
        logprobs = None if self.logprobs is None else [token.to_dict() for token in self.logprobs]
        return {**asdict(self), "boxes": [box.to_dict(self.image_size) for box in self.boxes], "logprobs": logprobs}


# Text as it becomes certain, and steps whose logits float32 [V] are sent back.
Pieces = Generator[str | Step, np.ndarray | None, Answer]


class Cancelled(VL2Error):
    """The stream was closed from another thread while it was being computed."""


@dataclass
class Progress:
    """What of an answer is there already, for those who watch its stream; cancelled: to end it at the next chance.

    positions: the most that prompt and answer take. pause: called between parts of the prompt's work, so that other
    answers may have a turn.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    cancelled: bool = False
    positions: int = 0
    pause: Callable[[], None] = lambda: None

    def check(self) -> None:
        """Raises Cancelled after the stream was closed from another thread."""
        if self.cancelled:
            raise Cancelled("the answer was cancelled", "its stream was closed; ask again")


class AnswerStream(Iterator[str]):
    """Pieces of text as they become certain; `answer` is there once they are all taken."""

    def __init__(self, pieces: Pieces, progress: Progress):
        self._pieces, self._progress = pieces, progress
        self._answer: Answer | None = None
        self._working = threading.Lock()  # held while a step is computed too, whose caches nobody else may be given

    def __next__(self) -> str:
        with self._working:
            found = self._advance()
            while not isinstance(found, str):
                try:
                    logits = found.run()
                except BaseException as error:  # the answer's own end, such as handing its context back
                    found = self._advance(error)
                else:
                    found = self._advance(logits)
            return found

    def resume(self, given: np.ndarray | BaseException | None = None) -> str | Step:
        """The next piece, or a step of which the logits float32 [V], or why there are none, are to be given next.

        For who takes steps of several answers together (`engine.run_steps`).
        """
        with self._working:
            return self._advance(given)

    def _advance(self, given: np.ndarray | BaseException | None = None) -> str | Step:
        try:
            return self._pieces.throw(given) if isinstance(given, BaseException) else self._pieces.send(given)
        except StopIteration as end:
            self._answer = end.value if self._answer is None else self._answer
            raise

    @property
    def answer(self) -> Answer:
        """The finished answer. Raises VL2Error while pieces are left and after `close`."""
        if self._answer is None:
            raise VL2Error("the answer is not finished", "take all pieces of the stream first")
        return self._answer

    @property
    def positions(self) -> int:
        """The most that prompt and answer will take of a cache."""
        return self._progress.positions

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of what has been generated so far."""
        return tuple(self._progress.token_ids)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """One of each of `token_ids`; None where none were asked for."""
        found = self._progress.logprobs
        return None if found is None else tuple(found[:len(self._progress.token_ids)])

    def read(self) -> Answer:
        """Takes what is left and returns the answer."""
        for _ in self:
            pass
        return self.answer

    def pause_with(self, call: Callable[[], None]) -> None:
        """Sets what is called between the prompt's chunks and images, in the iterating thread: other answers' turns."""
        self._progress.pause = call

    def cancel(self) -> None:
        """Lets the iterating thread get Cancelled before the next token, prefill chunk or image; from any thread."""
        self._progress.cancelled = True

    def close(self) -> None:
        """Ends the answer here; what was computed stays in the cache. Nothing when it has ended already.

        From another thread than the one that iterates it takes effect before the next token, prefill chunk or image:
        the iterating thread then gets Cancelled.
        """
        self._progress.cancelled = True
        if self._working.acquire(blocking=False):  # else the flag ends it
            try:
                self._pieces.close()
            finally:
                self._working.release()

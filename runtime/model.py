"""A model to ask: single questions, streams and conversations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from vl2.errors import VL2Error
from vl2.image import load_image
from vl2.manifest import Manifest
from vl2.prompt import IMAGE_PLACEHOLDER, Message
from vl2.runtime.answer import STOP, Answer, AnswerStream, Pieces
from vl2.runtime.context_pool import ContextPool
from vl2.runtime.engine import Context, Engine
from vl2.runtime.generate import Generation
from vl2.runtime.options import BundleOptions, GenerationOptions
from vl2.special_tokens import USER

ImageSource = str | os.PathLike | Image.Image


class Model:
    """An opened bundle. Not thread-safe: all answers are computed in one thread, those of `complete` also in turns.

    Another thread may call `complete`, one call at a time: it touches nothing that computing changes.
    """

    def __init__(self, engine: Engine, kv_cache_bytes: int = BundleOptions().kv_cache_bytes):
        self.engine = engine
        self._contexts = ContextPool(engine, kv_cache_bytes)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.engine.manifest

    @property
    def backend(self) -> str:
        """Where the graphs run, in one line; where CUDA is offered it loads the decoder to find out."""
        return self.engine.backend.description

    @property
    def largest_batch(self) -> int:
        """How many answers' steps may be taken together (`engine.run_steps`), each answer as it would be alone."""
        return self.engine.largest_batch

    def has_room(self, streams: Sequence[AnswerStream], more_bytes: int = 0) -> bool:
        """Whether there is memory for the caches of these answers of `complete`, begun or not, at their longest.

        more_bytes: to be had beside them, such as for images that are not decoded yet.
        """
        return self._contexts.has_room([stream.positions for stream in streams], more_bytes)

    def ask(
        self, question: str, images: Sequence[ImageSource] = (), options: GenerationOptions | None = None
    ) -> Answer:
        """The answer to one question about images (paths or Pillow images).

        `<image>` in the question places them, otherwise they come first, each as `<image>` and a newline.
        Raises VL2Error for an empty question, a wrong number of images, a broken image, a prompt too long.
        """
        return self.stream(question, images, options).read()

    def stream(
        self, question: str, images: Sequence[ImageSource] = (), options: GenerationOptions | None = None
    ) -> AnswerStream:
        """As `ask`, in pieces: iterate over the text, then take `.answer`."""
        return self.chat().stream(question, images, options)

    def complete(self, messages: Sequence[Message], options: GenerationOptions | None = None) -> AnswerStream:
        """The answer to a whole conversation, as a server gets it: the last message is the user's.

        The cache of an earlier conversation that begins alike is gone on with (BundleOptions.kv_cache_bytes); the
        answer is as from nothing. Streams of several conversations may be taken in turns. Raises VL2Error as `ask`
        does, and for roles or an order of messages that the template does not allow.
        """
        if not messages or messages[-1].role not in ("user", USER):
            found = f"ends with a {messages[-1].role!r} message" if messages else "is empty"
            raise VL2Error(f"the conversation {found}", "end it with a user message")
        layout = self.engine.processor.lay_out([*messages, Message("assistant", "")])
        generation = Generation(self.engine, layout, options or GenerationOptions())
        # Hashes the images here, where the caller may be a thread of its own.
        return AnswerStream(self._in_pool(generation, generation.inputs.contents), generation.progress)

    def _in_pool(self, generation: Generation, contents: np.ndarray) -> Pieces:
        with self._contexts.lent(contents) as context:
            return (yield from generation.pieces(context))

    def chat(self, system: str | None = None) -> Chat:
        """A new conversation, headed by a system message if given."""
        return Chat(self.engine, system)


class Chat:
    """A conversation that keeps its cache: of each question only what is new is computed.

    A third image switches tiling off for all (spec 3.2); the cache is then computed anew from the first image on.
    history: the messages so far; a stream that is not taken to its end leaves it unchanged.
    """

    def __init__(self, engine: Engine, system: str | None = None):
        self._engine = engine
        self._context = Context(engine)
        self.history: list[Message] = [] if system is None else [Message("system", system)]

    def ask(
        self, question: str, images: Sequence[ImageSource] = (), options: GenerationOptions | None = None
    ) -> Answer:
        """The answer to the next question; `images` are those that come with it. As Model.ask."""
        return self.stream(question, images, options).read()

    def stream(
        self, question: str, images: Sequence[ImageSource] = (), options: GenerationOptions | None = None
    ) -> AnswerStream:
        """As `ask`, in pieces: iterate over the text, then take `.answer`."""
        turn = user_message(question, images)
        layout = self._engine.processor.lay_out([*self.history, turn, Message("assistant", "")])
        generation = Generation(self._engine, layout, options or GenerationOptions())
        return AnswerStream(self._remember(turn, generation.pieces(self._context)), generation.progress)

    def _remember(self, turn: Message, pieces: Pieces) -> Pieces:
        answer = yield from pieces
        ids = answer.token_ids
        if answer.stop_reason == STOP:
            # The ids run into the stop string; the conversation goes on from what the user saw.
            ids = self._engine.processor.tokenizer.encode(answer.text, add_special_tokens=False).ids
        self.history += [turn, Message("assistant", answer.text, token_ids=ids)]
        return answer


def user_message(question: str, images: Sequence[ImageSource]) -> Message:
    """The user's turn, with its images loaded and placed. Raises VL2Error for an empty question and broken images."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        raise VL2Error(f"images is one {type(images).__name__}, expected a list", "write images=[...]")
    if not question.replace(IMAGE_PLACEHOLDER, "").strip():
        raise VL2Error(f"the question is {question!r}, expected some text", 'ask something, such as "What is shown?"')
    places = "" if IMAGE_PLACEHOLDER in question else f"{IMAGE_PLACEHOLDER}\n" * len(images)
    turn = Message("user", places + question, images)
    expected = turn.content.count(IMAGE_PLACEHOLDER)
    if expected != len(images):
        raise VL2Error(f"the question has {expected} {IMAGE_PLACEHOLDER} and {len(images)} images were given",
                       f"write one {IMAGE_PLACEHOLDER} for each image, or none and they come first")
    return replace(turn, images=tuple(load_image(image) for image in images))

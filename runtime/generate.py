"""The loop that turns a laid-out prompt into text: encode images, prefill in chunks, decode token by token."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from vl2.errors import VL2Error
from vl2.prompt import Layout
from vl2.runtime import grounding
from vl2.runtime.answer import EOS, LENGTH, STOP, Answer
from vl2.runtime.detokenize import TextStream
from vl2.runtime.engine import Context, Engine
from vl2.runtime.memory import peak_rss_bytes
from vl2.runtime.options import GenerationOptions
from vl2.runtime.prompt_embeds import contents_of, embed, image_spans
from vl2.runtime.sampling import Sampler


class Generation:
    """One answer in the making. Raises VL2Error for a prompt that leaves no position for an answer."""

    def __init__(self, engine: Engine, layout: Layout, context: Context, options: GenerationOptions):
        self._engine, self._layout, self._context, self._options = engine, layout, context, options
        self._limit = min(options.max_new_tokens, _room_for_answer(engine, layout))
        self._sampler = Sampler(options, layout.input_ids, engine.manifest.language.vocab_size)
        self._stream = TextStream(engine.token_bytes, options.stop)
        self._ids: list[int] = []
        self._reused = self._decode_steps = 0
        self._seconds = dict.fromkeys(("load", "encode", "prefill", "decode"), 0.0)
        context.turn += 1
        self._turn = context.turn

    def pieces(self) -> Generator[str, None, Answer]:
        """Yields text as it becomes certain and returns the Answer; the context then holds all that was computed."""
        token = self._first_token()
        reason = EOS
        while token != self._engine.processor.eos_id or self._options.ignore_eos:
            self._ids.append(token)
            if piece := self._stream.push(token):
                yield piece
            if self._stream.stopped or len(self._ids) == self._limit:
                reason = STOP if self._stream.stopped else LENGTH
                break
            token = self._next_token(token)
        if piece := self._stream.finish():
            yield piece
        return self._answer(STOP if self._stream.stopped else reason)

    def _first_token(self) -> int:
        self._check_turn()
        contents = contents_of(self._layout, self._engine)
        self._reused = self._context.keep_common(contents)
        with self._timed("load"):
            self._load_graphs()
        with self._timed("encode"):
            embeds = embed(self._engine, self._layout, self._reused)
        with self._timed("prefill"):
            logits = self._context.prefill(contents[self._reused:], embeds, self._options.prefill_chunk)
            return self._sampler.draw(logits)

    def _load_graphs(self) -> None:
        """The vision graph only where an image is not in the cache yet."""
        self._engine.backend.load("decoder")
        if any(end > self._reused for _, end in image_spans(self._layout, self._engine)):
            self._engine.backend.load("vision")

    def _next_token(self, token: int) -> int:
        self._check_turn()
        with self._timed("decode"):
            self._decode_steps += 1
            return self._sampler.draw(self._context.decode_step(token))

    def _check_turn(self) -> None:
        if self._context.turn != self._turn:
            raise VL2Error("another answer was begun in this conversation", "finish one stream before the next")

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - start

    def _answer(self, reason: str) -> Answer:
        found = grounding.parse(self._stream.text)
        images, seconds = self._layout.images, self._seconds
        return Answer(
            text=self._stream.text,
            token_ids=tuple(self._ids),
            prompt_tokens=len(self._layout.input_ids),
            reused_tokens=self._reused,
            boxes=found.boxes,
            box_problems=found.problems,
            image_size=images[-1].size if images else None,
            stop_reason=reason,
            load_ms=seconds["load"] * 1e3,
            encode_ms=seconds["encode"] * 1e3,
            prefill_ms=seconds["prefill"] * 1e3,
            decode_ms=seconds["decode"] * 1e3,
            tokens_per_second=self._decode_steps / seconds["decode"] if self._decode_steps else None,
            peak_rss_bytes=peak_rss_bytes(),
        )


def _room_for_answer(engine: Engine, layout: Layout) -> int:
    prompt, limit = len(layout.input_ids), engine.manifest.language.max_position_embeddings
    if prompt >= limit:
        raise VL2Error(
            f"the prompt has {prompt:,} tokens, {int(layout.images_seq_mask.sum()):,} of them for "
            f"{len(layout.images)} images; with the answer the model holds {limit:,}",
            "shorten the text, give fewer or less elongated images, or begin a new chat",
        )
    return limit - prompt

"""The loop that turns a laid-out prompt into text: encode images, prefill in chunks, decode token by token."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np

from vl2.errors import VL2Error
from vl2.memory import peak_rss_bytes
from vl2.prompt import Layout
from vl2.runtime import grounding
from vl2.runtime.answer import EOS, LENGTH, LOOP, STOP, Answer, Pieces, Progress
from vl2.runtime.constrained import Matcher
from vl2.runtime.detokenize import TextStream
from vl2.runtime.engine import Context, Engine, Step
from vl2.runtime.logprobs import describe_token, log_probabilities
from vl2.runtime.options import GenerationOptions
from vl2.runtime.prompt_embeds import PromptInputs
from vl2.runtime.repetition import RepetitionGuard
from vl2.runtime.sampling import Sampler


class Generation:
    """One answer in the making.

    Raises VL2Error for a prompt that leaves no position for an answer and for a constraint that cannot be used.
    """

    def __init__(self, engine: Engine, layout: Layout, options: GenerationOptions):
        self._engine, self._options = engine, options
        self._prompt_tokens, self._image_sizes = len(layout.input_ids), [image.size for image in layout.images]
        self._limit = min(options.max_new_tokens, _room_for_answer(engine, layout))
        self._sampler = Sampler(options, layout.input_ids, engine.manifest.language.vocab_size)
        self._matcher = None if options.constraint is None else Matcher(
            options.constraint, engine.grammar_tokenizer, engine.token_bytes)
        self._guard = RepetitionGuard() if options.repetition_guard and not options.ignore_eos else None
        self._stream = TextStream(engine.token_bytes, options.stop)
        self._loop: str | None = None
        self._reused = self._decode_steps = 0
        self._seconds = dict.fromkeys(("load", "encode", "prefill", "decode"), 0.0)
        self.inputs = PromptInputs(engine, layout)
        self.progress = Progress([], None if options.top_logprobs is None else [],
                                 positions=len(layout.input_ids) + self._limit)

    def pieces(self, context: Context) -> Pieces:
        """Yields text as it becomes certain and steps, whose logits are to be sent back; returns the Answer.

        The context then holds all that was computed.

        From here on an earlier stream of the same context cannot go on.
        """
        context.turn += 1
        self._context, self._turn = context, context.turn
        return self._pieces()

    def _pieces(self) -> Pieces:
        token = self._first_token()
        reason = EOS
        while token != self._engine.processor.eos_id or self._options.ignore_eos:
            self.progress.token_ids.append(token)
            if piece := self._stream.push(token):
                yield piece
            if ended := self._end_after(token):
                reason = ended
                break
            token = yield from self._next_token(token)
        if piece := self._stream.finish():
            yield piece
        return self._answer(STOP if self._stream.stopped else reason)

    def _end_after(self, token: int) -> str | None:
        """Why the answer ends with this token, None where it goes on."""
        complete = self._matcher is not None and self._matcher.push(token)
        block = None if self._guard is None else self._guard.push(token)
        ids = self.progress.token_ids
        if self._stream.stopped:
            return STOP
        if complete:
            return EOS
        if block is not None:
            said = self._engine.processor.tokenizer.decode(ids[-block:], skip_special_tokens=False)
            plural = "s" if block > 1 else ""
            self._loop = f"a block of {block} token{plural} is repeated over and over: {said[:60]!r}"
            return LOOP
        return LENGTH if len(ids) == self._limit else None

    def _first_token(self) -> int:
        self._check()
        self._reused = self._context.keep_common(self.inputs.contents)
        with self._timed("load"):
            self._load_graphs()
        with self._timed("encode"):
            embeds = self.inputs.embeds(self._reused, self._between)
            self.inputs.let_go()
        with self._timed("prefill"):
            contents = self.inputs.contents[self._reused:]
            return self._choose(self._context.prefill(contents, embeds, self._options.prefill_chunk, self._between))

    def _load_graphs(self) -> None:
        """The vision graph only where an image is in no cache yet."""
        self._engine.backend.load("decoder")
        if self.inputs.needs_vision(self._reused):
            self._engine.backend.load("vision")

    def _next_token(self, token: int) -> Generator[Step, np.ndarray, int]:
        self._check()
        with self._timed("decode"):
            self._decode_steps += 1
            return self._choose((yield Step(self._context, token)))

    def _choose(self, logits: np.ndarray) -> int:
        """The next token of float32 [V] logits; its logprob is of the model's own distribution."""
        asked = self.progress.logprobs
        logprobs = None if asked is None else log_probabilities(logits)
        token = self._sampler.draw(logits, None if self._matcher is None else self._matcher.allowed())
        if asked is not None:
            asked.append(describe_token(logprobs, token, self._options.top_logprobs, self._engine.token_bytes))
        return token

    def _between(self) -> None:
        """Between parts of the prompt's work."""
        self.progress.pause()
        self._check()

    def _check(self) -> None:
        self.progress.check()
        if self._context.turn != self._turn:
            raise VL2Error("another answer was begun in this conversation", "finish one stream before the next")

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - start

    def _answer(self, reason: str) -> Answer:
        found = grounding.parse(self._stream.text)
        sizes, seconds, ids = self._image_sizes, self._seconds, self.progress.token_ids
        logprobs = self.progress.logprobs
        return Answer(
            text=self._stream.text,
            token_ids=tuple(ids),
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused,
            boxes=found.boxes,
            box_problems=found.problems,
            image_size=sizes[-1] if sizes else None,
            stop_reason=reason,
            load_ms=seconds["load"] * 1e3,
            encode_ms=seconds["encode"] * 1e3,
            prefill_ms=seconds["prefill"] * 1e3,
            decode_ms=seconds["decode"] * 1e3,
            tokens_per_second=self._decode_steps / seconds["decode"] if self._decode_steps else None,
            peak_rss_bytes=peak_rss_bytes(),
            image_cache_hits=len(sizes) - self.inputs.encoded,
            loop=self._loop,
            logprobs=None if logprobs is None else tuple(logprobs[:len(ids)]),
        )


def _room_for_answer(engine: Engine, layout: Layout) -> int:
    prompt, limit, holder = len(layout.input_ids), engine.manifest.language.max_position_embeddings, "model holds"
    if engine.backend.limits.context is not None and engine.backend.limits.context < limit:
        limit, holder = engine.backend.limits.context, "engines hold"
    if prompt >= limit:
        raise VL2Error(
            f"the prompt has {prompt:,} tokens, {int(layout.images_seq_mask.sum()):,} of them for "
            f"{len(layout.images)} images; with the answer the {holder} {limit:,}",
            "shorten the text, give fewer or less elongated images, or begin a new chat",
        )
    return limit - prompt

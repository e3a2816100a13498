"""One question through a bundle, with every position's logits seen: freely (greedy) or along given tokens.

A bundle's decoder gives the logits of the last position it is fed. Stepping token by token therefore gives those of
every answer position, and of the prompt's text positions where they are stepped through too. Positions of an image are
fed in chunks: their logits are not seen and no figure is given for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vl2.errors import VL2Error
from vl2.prompt import Message
from vl2.runtime import Model
from vl2.runtime.answer import EOS, LENGTH
from vl2.runtime.detokenize import TextStream
from vl2.runtime.engine import Context
from vl2.runtime.prompt_embeds import contents_of, embed

ANSWER, TEXT = 0, 1
KINDS = {"answer": ANSWER, "text": TEXT}


@dataclass(frozen=True)
class WalkOptions:
    """max_new_tokens: of an answer; prompt_text: also see the prompt's text positions, one step each; prefill_chunk:
    prompt tokens taken at once elsewhere."""

    max_new_tokens: int = 512
    prompt_text: bool = False
    prefill_chunk: int = 512


@dataclass(frozen=True)
class Position:
    """A seen position. kind: ANSWER or TEXT; target: the id that follows it; logits: float32 [V], its distribution."""

    kind: int
    target: int
    logits: np.ndarray


See = Callable[[Position], None]


@dataclass(frozen=True)
class Reply:
    """A greedy answer. token_ids: without the end token; stop_reason: "eos" or "length"."""

    token_ids: tuple[int, ...]
    text: str
    stop_reason: str


class Walk:
    """A question laid out for a model. Raises VL2Error for a prompt that leaves no position for an answer.

    context: of the question before, so that a second question about the same image does not encode it again.
    """

    def __init__(self, context: Context, model: Model, conversation: Sequence[Message], options: WalkOptions):
        engine = model.engine
        self._engine, self._context, self._options = engine, context, options
        self._layout = engine.processor.lay_out(conversation)
        room = engine.manifest.language.max_position_embeddings - len(self._layout.input_ids)
        if room < 1:
            raise VL2Error(f"the prompt has {len(self._layout.input_ids):,} tokens, the model holds "
                           f"{engine.manifest.language.max_position_embeddings:,} with the answer")
        self._limit = min(options.max_new_tokens, room)
        self._contents = contents_of(self._layout, engine)
        self._eos = engine.processor.eos_id

    def greedy(self, see: See) -> Reply:
        """The greedy answer; `see` gets each position with the token that was chosen there."""
        logits, ids = self._prefill(see), []
        return self._go_on(logits, ids, lambda logits, token: see(Position(ANSWER, token, logits)))

    def along(self, reference: Reply, see: See) -> Reply:
        """This model's own greedy answer, after `see` got each position of the reference's answer.

        Up to the first token that this model would choose otherwise the two are one walk; from there on it goes back in
        the cache and on by itself.
        """
        targets = [*reference.token_ids, *([self._eos] if reference.stop_reason == EOS else [])]
        logits, parting = self._prefill(see), None
        for index, target in enumerate(targets):
            see(Position(ANSWER, target, logits))
            choice = int(np.argmax(logits))
            if parting is None and choice != target:
                parting = index, choice
            if index + 1 < len(targets):
                logits = self._context.decode_step(target)
        if parting is None:
            return Reply(reference.token_ids, self._text(reference.token_ids), reference.stop_reason)
        return self._part(targets[:parting[0]], parting[1])

    def _part(self, ids: list[int], choice: int) -> Reply:
        """The answer that begins with `ids` and goes on with `choice` instead of the reference's token."""
        if choice == self._eos:
            return Reply(tuple(ids), self._text(ids), EOS)
        kept = self._context.keep_common(np.concatenate([self._contents, np.array([*ids, choice], np.int64)]))
        assert kept == len(self._contents) + len(ids), "the cache holds the prompt and the common tokens"
        ids.append(choice)
        if len(ids) == self._limit:
            return Reply(tuple(ids), self._text(ids), LENGTH)
        return self._go_on(self._context.decode_step(choice), ids, lambda logits, token: None)

    def _go_on(self, logits: np.ndarray, ids: list[int], seen: Callable[[np.ndarray, int], None]) -> Reply:
        while True:
            token = int(np.argmax(logits))
            seen(logits, token)
            if token == self._eos:
                return Reply(tuple(ids), self._text(ids), EOS)
            ids.append(token)
            if len(ids) == self._limit:
                return Reply(tuple(ids), self._text(ids), LENGTH)
            logits = self._context.decode_step(token)

    def _prefill(self, see: See) -> np.ndarray:
        """float32 [V] logits of the prompt's last position."""
        if not self._options.prompt_text:
            kept = self._context.keep_common(self._contents)
            embeds = embed(self._engine, self._layout, kept)
            return self._context.prefill(self._contents[kept:], embeds, self._options.prefill_chunk)
        self._context = Context(self._engine)  # every text position is to be seen, none found in the cache
        embeds, is_image = embed(self._engine, self._layout, 0), self._layout.images_seq_mask
        bounds = np.flatnonzero(np.diff(is_image.astype(np.int8))) + 1
        for start, end in zip([0, *bounds], [*bounds, len(is_image)], strict=True):
            if is_image[start]:
                logits = self._context.prefill(self._contents[start:end], embeds[start:end],
                                               self._options.prefill_chunk)
                continue
            for position in range(start, end):
                one = slice(position, position + 1)
                logits = self._context.prefill(self._contents[one], embeds[one], 1)
                if position + 1 < end:
                    see(Position(TEXT, int(self._layout.input_ids[position + 1]), logits))
        return logits

    def _text(self, ids: Sequence[int]) -> str:
        stream = TextStream(self._engine.token_bytes)
        for token in ids:
            stream.push(token)
        stream.finish()
        return stream.text

"""An opened bundle, and what one conversation has computed with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np

from vl2 import __version__
from vl2.manifest import CACHE_ROW, Manifest
from vl2.prompt import Processor
from vl2.runtime.backend import Backend
from vl2.runtime.cache_slots import CacheSlots, SlotCache
from vl2.runtime.constrained import grammar_tokenizer
from vl2.runtime.detokenize import TokenBytes
from vl2.runtime.embeddings import Embeddings
from vl2.runtime.image_cache import ImageCache
from vl2.runtime.kv_cache import KVCache, position_bytes
from vl2.runtime.options import BundleOptions


@dataclass(frozen=True)
class Engine:
    """An opened bundle, without any state of a conversation."""

    manifest: Manifest
    processor: Processor
    embeddings: Embeddings
    backend: Backend
    image_cache: ImageCache = field(default_factory=lambda: ImageCache(BundleOptions().image_cache_bytes))

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """Text of tokens, where bos, eos and pad stand for none; grounding tokens stay, callers parse them."""
        special = self.processor.special
        return TokenBytes(self.processor.tokenizer, (special.bos_id, special.eos_id, special.pad_id))

    @cached_property
    def identity(self) -> bytes:
        """sha256 of all that an image's vectors depend on besides its pixels: this code, the bundle, where it runs."""
        files = sorted((name, facts.sha256) for name, facts in self.manifest.files.items())
        return sha256(repr((__version__, files, self.backend.description)).encode()).digest()

    @cached_property
    def largest_batch(self) -> int:
        """How many sequences may decode together, each with the answer that it would give alone."""
        return LARGEST_BATCH if self.manifest.graphs["decoder"].slots else 1

    @cached_property
    def position_bytes(self) -> int:
        """Memory of one position of a sequence's cache."""
        return position_bytes(self.manifest.graphs["decoder"])

    @cached_property
    def _slots(self) -> CacheSlots:
        return CacheSlots(self.manifest.graphs["decoder"], self.manifest.language.max_position_embeddings)

    def new_cache(self) -> KVCache:
        """An empty cache of one sequence."""
        graph, backend = self.manifest.graphs["decoder"], self.backend
        return SlotCache(self._slots) if graph.slots else KVCache(graph, backend.cache_memory, backend.limits.context)

    @cached_property
    def grammar_tokenizer(self) -> Any:
        """The tokenizer as constraints need it. Raises VL2Error when llguidance is not installed."""
        return grammar_tokenizer(self.processor.tokenizer, self.manifest.language.vocab_size, self.processor.eos_id)


# The rows of a decode step up to here have the bits of single runs (plugins/native/README.md).
LARGEST_BATCH = 8


class Context:
    """What the cache of one conversation holds: a value a position, and the entries themselves.

    The value is the token id, or for a position of an image a negative number made from its pixels and crop.
    turn: counts the answers begun, so that a stream can tell that another one has taken over.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._limits = engine.backend.limits
        self._cache = engine.new_cache()
        self._contents: list[int] = []
        self.turn = 0

    @property
    def length(self) -> int:
        """How many positions are held."""
        return self._cache.length

    @property
    def used_bytes(self) -> int:
        """Memory of the cache; of the host's, as far as it was ever written."""
        return self._cache.used_bytes

    def bytes_for(self, length: int) -> int:
        """Memory of `length` positions."""
        return length * self._cache.position_bytes

    def copy_prefix(self, other: Context, length: int, room: int) -> None:
        """Takes over the first `length` positions of another context, with room for `room` in all."""
        self._cache.reserve(length, room - length)
        self._cache.copy_prefix(other._cache, length)
        self._contents = other._contents[:length]

    def common_length(self, contents: np.ndarray) -> int:
        """How many positions of `contents` int64 [T] are here: all before the first that differs, at most T - 1."""
        held = np.array(self._contents[:len(contents) - 1], np.int64)
        differs = np.flatnonzero(held != contents[:len(held)])
        return int(differs[0]) if len(differs) else len(held)

    def keep_common(self, contents: np.ndarray) -> int:
        """How many positions of `contents` int64 [T] are kept: all before the first that differs, at most T - 1."""
        kept = self.common_length(contents)
        self._cache.truncate(kept)
        del self._contents[kept:]
        return kept

    def prefill(
        self, contents: np.ndarray, embeds: np.ndarray, chunk: int, between: Callable[[], None] = lambda: None
    ) -> np.ndarray:
        """float32 [V] logits of the last position, after adding `contents` int64 [t] with `embeds` float32 [t, H].

        chunk: tokens at once, fewer where the backend takes fewer. between: called before each chunk, may raise; the
        chunks before it stay.
        """
        # Room for the first answer tokens too: growing right after a long prefill would copy all of it.
        self._cache.reserve(self._cache.length + len(embeds), min(len(embeds), 64))
        chunk = min(chunk, self._limits.tokens or chunk)
        for start in range(0, len(embeds), chunk):
            between()
            part = slice(start, start + chunk)
            logits = _extend(self._engine, [self], contents[None, part], embeds[None, part])
        return logits[0]

    def decode_step(self, token: int) -> np.ndarray:
        """float32 [V] logits after one more token."""
        return Step(self, token).run()


@dataclass(frozen=True, eq=False)
class Step:
    """A token that a context is to take in next."""

    context: Context
    token: int

    def run(self) -> np.ndarray:
        """float32 [V] logits behind the token."""
        return run_steps([self])[0]


def run_steps(steps: Sequence[Step]) -> list[np.ndarray]:
    """float32 [V] logits of each of several contexts' steps, those whose caches lie together as one batch.

    At most `Engine.largest_batch` of them. Where it raises, no context has changed that was not already done.
    """
    batches: dict[int, list[Step]] = {}
    for step in steps:
        batches.setdefault(id(step.context._cache.slab or step), []).append(step)
    logits = {}
    for batch in batches.values():
        engine, contexts = batch[0].context._engine, [step.context for step in batch]
        for context in contexts:
            context._cache.reserve(context.length + 1)
        tokens = np.array([step.token for step in batch])
        rows = _extend(engine, contexts, tokens[:, None], engine.embeddings.lookup(tokens)[:, None])
        logits.update(zip(batch, rows, strict=True))
    return [logits[step] for step in steps]


def _extend(engine: Engine, contexts: list[Context], contents: np.ndarray, embeds: np.ndarray) -> np.ndarray:
    """float32 [B, V] logits behind `contents` int64 [B, t] with `embeds` float32 [B, t, H], one row a context."""
    caches, tokens = [context._cache for context in contexts], embeds.shape[1]
    lengths, cache = np.array([cache.length for cache in caches], np.int64), caches[0]
    feeds = {"inputs_embeds": embeds, "position_ids": lengths[:, None] + np.arange(tokens)}
    if cache.slab is not None:
        feeds |= {"past_length": lengths, CACHE_ROW: np.array([cache.slot for cache in caches], np.int64)}
    elif cache.in_place:
        feeds["past_length"] = lengths.reshape(())
    else:
        feeds["attention_mask"] = np.ones((1, cache.length + tokens), bool)
    logits = np.empty((len(contexts), engine.manifest.language.vocab_size), np.float32)
    engine.backend.run("decoder", feeds | cache.past(), {"logits": logits, **cache.room(tokens)})
    for context, row in zip(contexts, contents.tolist(), strict=True):
        context._cache.append(tokens)
        context._contents += row
    return logits

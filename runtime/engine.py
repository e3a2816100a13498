"""An opened bundle, and what one conversation has computed with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np

from vl2 import __version__
from vl2.manifest import Manifest
from vl2.prompt import Processor
from vl2.runtime.backend import Backend
from vl2.runtime.constrained import grammar_tokenizer
from vl2.runtime.detokenize import TokenBytes
from vl2.runtime.embeddings import Embeddings
from vl2.runtime.image_cache import ImageCache
from vl2.runtime.kv_cache import KVCache
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
    def grammar_tokenizer(self) -> Any:
        """The tokenizer as constraints need it. Raises VL2Error when llguidance is not installed."""
        return grammar_tokenizer(self.processor.tokenizer, self.manifest.language.vocab_size, self.processor.eos_id)


class Context:
    """What the cache of one conversation holds: a value a position, and the entries themselves.

    The value is the token id, or for a position of an image a negative number made from its pixels and crop.
    turn: counts the answers begun, so that a stream can tell that another one has taken over.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._limits = engine.backend.limits
        self._cache = KVCache(engine.manifest.graphs["decoder"], engine.backend.cache_memory, self._limits.context)
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
            logits = self._extend(contents[start:start + chunk].tolist(), embeds[start:start + chunk])
        return logits

    def decode_step(self, token: int) -> np.ndarray:
        """float32 [V] logits after one more token."""
        self._cache.reserve(self._cache.length + 1)
        return self._extend([token], self._engine.embeddings.lookup(np.array([token])))

    def _extend(self, contents: list[int], embeds: np.ndarray) -> np.ndarray:
        cache, tokens = self._cache, len(embeds)
        total = cache.length + tokens
        feeds = {"inputs_embeds": embeds[None], "position_ids": np.arange(cache.length, total, dtype=np.int64)[None]}
        if cache.in_place:
            feeds["past_length"] = np.array(cache.length, np.int64)
        else:
            feeds["attention_mask"] = np.ones((1, total), bool)
        logits = np.empty((1, self._engine.manifest.language.vocab_size), np.float32)
        self._engine.backend.run("decoder", feeds | cache.past(), {"logits": logits, **cache.room(tokens)})
        cache.append(tokens)
        self._contents += contents
        return logits[0]

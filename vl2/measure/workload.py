"""What a bundle is asked while it is measured: texts of wanted lengths and images that no cache holds yet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vl2.errors import VL2Error
from vl2.manifest import Manifest
from vl2.prompt import Message, Processor

DEFAULT_CONTEXTS = (128, 512, 2048)
# Fixed, as the first of a process has to come without any preparation; different from the first word on.
COLD, WARM, FIRST_IMAGE, SECOND_IMAGE, AGAIN = (
    "Describe in one sentence what a reader should know about this document.",
    "Name in one line what a visitor could learn from that second picture.",
    "What is shown here?", "Which things are in this picture?", "And where are they?",
)
# A word that byte-level BPE has as one token, with its space; shorter ones merge with their neighbours.
_WORD = re.compile("Ġ([a-z]{3,})")
_FALLBACK = ("total", "amount", "date", "name", "table", "chart", "colour", "left", "right", "page", "line", "title")


@dataclass(frozen=True)
class Workload:
    """contexts: prompt lengths in tokens, ascending. image_size: (width, height) in pixels, None for one tile and the
    global view. prefill_chunk: as of GenerationOptions. seed: another one gives other texts and pixels."""

    contexts: tuple[int, ...] = DEFAULT_CONTEXTS
    new_tokens: int = 32
    image_size: tuple[int, int] | None = None
    prefill_chunk: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        # The first token comes from the prefill, so that one alone decodes nothing.
        if self.new_tokens < 2:
            raise VL2Error(f"{self.new_tokens} new tokens were asked for, expected at least 2")
        if not self.contexts or list(self.contexts) != sorted(set(self.contexts)):
            raise VL2Error(f"the contexts are {self.contexts}, expected different ones in ascending order")


def fitting_contexts(manifests: Sequence[Manifest], new_tokens: int) -> tuple[int, ...]:
    """Those of the usual contexts that every bundle holds together with the answer, else the longest it holds."""
    limit = min(manifest.language.max_position_embeddings for manifest in manifests)
    return tuple(context for context in DEFAULT_CONTEXTS if context + new_tokens <= limit) or (limit - new_tokens,)


def check_contexts(workload: Workload, manifests: Sequence[Manifest]) -> None:
    """Raises VL2Error where a bundle does not hold the longest context and its answer."""
    needed = workload.contexts[-1] + workload.new_tokens
    for manifest in manifests:
        limit = manifest.language.max_position_embeddings
        if needed > limit:
            raise VL2Error(f"a context of {workload.contexts[-1]:,} and {workload.new_tokens} new tokens were asked "
                           f"for, the model holds {limit:,}", "give smaller values of --context")


class Texts:
    """Questions of wanted lengths; words are drawn at random, so that a router chooses as for any text."""

    def __init__(self, processor: Processor, seed: int):
        self._processor = processor
        matches = (_WORD.fullmatch(token) for token in sorted(processor.tokenizer.get_vocab()))
        self._words = [match[1] for match in matches if match] or list(_FALLBACK)
        self._random = np.random.default_rng(seed)

    def question(self, history: Sequence[Message], tokens: int) -> str:
        """The text with which the conversation's prompt has `tokens` tokens, or as many as whole words allow below.

        Raises VL2Error where the conversation leaves no room for a word.
        """
        words = [self._words[index] for index in self._random.integers(0, len(self._words), tokens)]
        low, high = 0, len(words)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._length(history, words[:middle]) <= tokens else (low, middle - 1)
        if not low:
            raise VL2Error(f"no question fits a prompt of {tokens} tokens",
                           "give larger values of --context, further apart than --new-tokens")
        return " ".join(words[:low])

    def _length(self, history: Sequence[Message], words: Sequence[str]) -> int:
        turn = Message("user", " ".join(words))
        return len(self._processor.lay_out([*history, turn, Message("assistant", "")]).input_ids)


def noise_images(size: tuple[int, int], seed: int) -> Iterator[Image.Image]:
    """Images of (width, height), each of other random pixels; time does not depend on what an image shows."""
    random, (width, height) = np.random.default_rng(seed), size
    while True:
        yield Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))

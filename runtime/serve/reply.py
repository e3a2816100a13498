"""Answers in OpenAI's form, whole and in chunks, with what this model adds: boxes, timings."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from vl2.runtime import Answer
from vl2.runtime.logprobs import TokenLogprob
from vl2.runtime.serve.api_error import ApiError

DONE = b"data: [DONE]\n\n"
# OpenAI has no word for the repetition guard; the choice's `loop` says when it acted.
_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "loop": "length"}
_TIMINGS = ("load_ms", "encode_ms", "prefill_ms", "decode_ms", "tokens_per_second", "image_cache_hits",
            "peak_rss_bytes")


@dataclass(frozen=True)
class Reply:
    """Builds the parts of one answer. name: the request's; model: its served name; usage: in a last chunk too."""

    name: str
    model: str
    usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The chat.completion object."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {**self._head("chat.completion"), "choices": [{"index": 0, "message": message, **_ending(answer)}],
                "usage": usage_of(answer), "timings": timings_of(answer)}

    def first(self) -> bytes:
        """The chunk that names the role."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> bytes:
        """A chunk of text."""
        return self._chunk({"content": text})

    def last(self, answer: Answer) -> bytes:
        """The chunk that ends the choice, with logprobs and boxes of the whole answer; then usage, if asked for."""
        ending = self._chunk({}, {"timings": timings_of(answer)}, **_ending(answer))
        if not self.usage:
            return ending + DONE
        closing = {**self._head("chat.completion.chunk"), "choices": [], "usage": usage_of(answer)}
        return ending + _event(closing) + DONE

    @staticmethod
    def failed(error: ApiError) -> bytes:
        """The event of an error after the first chunk; the stream ends with it."""
        return _event(error.body())

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.name}", "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: dict[str, Any], more: dict[str, Any] | None = None, **choice: Any) -> bytes:
        chunk = {**self._head("chat.completion.chunk"), **(more or {}),
                 "choices": [{"index": 0, "delta": delta, "finish_reason": None, **choice}]}
        return _event({**chunk, "usage": None} if self.usage else chunk)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _ending(answer: Answer) -> dict[str, Any]:
    """What a choice ends with: reason, logprobs, grounding."""
    logprobs = None if answer.logprobs is None else {"content": [_logprob(token) for token in answer.logprobs]}
    return {"finish_reason": _REASONS[answer.stop_reason], "logprobs": logprobs,
            "boxes": [box.to_dict(answer.image_size) for box in answer.boxes],
            "box_problems": list(answer.box_problems),
            "image_size": None if answer.image_size is None else list(answer.image_size), "loop": answer.loop}


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {**_candidate(token.text, token.logprob),
            "top_logprobs": [_candidate(text, logprob) for _, text, logprob in token.top]}


def _candidate(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(text)}


def usage_of(answer: Answer) -> dict[str, Any]:
    """OpenAI's usage object."""
    prompt, completion = answer.prompt_tokens, len(answer.token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": answer.reused_tokens}}


def timings_of(answer: Answer) -> dict[str, Any]:
    """Where the time went; without a rate where nothing was decoded."""
    return {name: value for name in _TIMINGS if (value := getattr(answer, name)) is not None}

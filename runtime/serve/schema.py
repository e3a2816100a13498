"""The JSON that comes in and goes out, as JSON Schema: requests are checked by it, and /openapi.json shows it."""

from __future__ import annotations

from typing import Any

from vl2.runtime.serve.settings import Limits

Schema = dict[str, Any]

MAX_STOPS, MAX_STOP_LENGTH, MAX_TOP_LOGPROBS, MAX_MESSAGES, MAX_REGEX_LENGTH = 16, 200, 20, 500, 10_000
# The largest whole number that every JSON reader keeps.
_MAX_SEED = 2 ** 53 - 1


def obj(properties: Schema, required: tuple[str, ...] = (), closed: bool = True) -> Schema:
    """An object; `closed` allows no other keys."""
    schema: Schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = list(required)
    return {**schema, "additionalProperties": False} if closed else schema


def _or_null(schema: Schema) -> Schema:
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return {**schema, "type": [*kinds, "null"]}


def _number(low: float, high: float, text: str, **more: Any) -> Schema:
    return _or_null({"type": "number", "minimum": low, "maximum": high, "description": text, **more})


def _whole(low: int, high: int, text: str) -> Schema:
    return _or_null({"type": "integer", "minimum": low, "maximum": high, "description": text})


_TEXT = {"type": "string"}
_NULL = {"type": "null"}
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_TEXT_PART = obj({"type": {"const": "text"}, "text": _TEXT}, ("type", "text"))
_IMAGE_URL = obj({
    "url": {"type": "string", "minLength": 1, "description": "`data:image/…;base64,…`; an https URL of an allowed host;"
            " a path below the image root, plain or as `file:` URL."},
    "detail": {"enum": ["auto"], "description": "The model has one way to look."},
}, ("url",))
_IMAGE_PART = obj({"type": {"const": "image_url"}, "image_url": _IMAGE_URL}, ("type", "image_url"))


# What clients put into a message as null, such as the official one's `model_dump()`; it means nothing as long as it is.
_UNSET = dict.fromkeys(("name", "refusal", "audio", "annotations", "tool_calls", "tool_call_id", "function_call"),
                       _NULL)


def _message(roles: list[str], content: Schema) -> Schema:
    return obj({"role": {"enum": roles}, "content": content, **_UNSET}, ("role", "content"))


def _parts(*kinds: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": {"anyOf": list(kinds)}}


MESSAGES = {
    "system": _message(["system", "developer"], {"anyOf": [_TEXT, _parts(_TEXT_PART)]}),
    "user": _message(["user"], {"anyOf": [_TEXT, _parts(_TEXT_PART, _IMAGE_PART)]}),
    "assistant": _message(["assistant"], {"anyOf": [_TEXT, _parts(_TEXT_PART)]}),
}

_FORMATS = {
    "text": obj({"type": {"const": "text"}}, ("type",)),
    "json_object": obj({"type": {"const": "json_object"}}, ("type",)),
    "json_schema": obj({
        "type": {"const": "json_schema"},
        "json_schema": obj({"name": _TEXT, "description": _or_null(_TEXT), "schema": {"type": "object"},
                            "strict": {"type": ["boolean", "null"]}}, ("schema",)),
    }, ("type", "json_schema")),
}


def request_schema(limits: Limits) -> Schema:
    """Of the body of /v1/chat/completions; unknown fields are refused."""
    most = limits.new_tokens
    return obj({
        "messages": {"type": "array", "minItems": 1, "maxItems": MAX_MESSAGES,
                     "items": {"anyOf": list(MESSAGES.values())},
                     "description": "Optionally a system message, then user and assistant; the last from the user."},
        "model": {"type": "string", "description": "The name of /v1/models; may be left out."},
        "stream": {"type": ["boolean", "null"]},
        "stream_options": {"anyOf": [obj({"include_usage": {"type": ["boolean", "null"]}}), _NULL],
                           "description": "Only with `stream`."},
        "max_tokens": _whole(1, most, "Of the answer. 512 without it, or the limit where that is less."),
        "max_completion_tokens": _whole(1, most, "As `max_tokens`; not both."),
        "temperature": _number(0, 100, "0, also without it: the likeliest token."),
        "top_p": _number(0, 1, "Nucleus sampling.", exclusiveMinimum=0),
        "seed": _whole(0, _MAX_SEED, "Makes sampling repeatable."),
        "repetition_penalty": _number(0, 100, "Over prompt and answer.", exclusiveMinimum=0),
        "frequency_penalty": _number(-2, 2, "Taken from a token's logit for each time that the answer has it."),
        "presence_penalty": _number(-2, 2, "Taken from a token's logit once the answer has it."),
        "stop": {"anyOf": [_STOP, _NULL, {"type": "array", "maxItems": MAX_STOPS, "items": _STOP}]},
        "logprobs": {"type": ["boolean", "null"]},
        "top_logprobs": _whole(0, MAX_TOP_LOGPROBS, "Only with `logprobs`."),
        "n": _whole(1, 1, "One answer."),
        "response_format": {"anyOf": [*_FORMATS.values(), _NULL]},
        "guided_regex": {"type": ["string", "null"], "minLength": 1, "maxLength": MAX_REGEX_LENGTH,
                         "description": "The whole answer matches it; Rust's syntax."},
        "boxes": {"type": ["boolean", "null"], "description": "true: box lists in the answer are always well formed."},
        "user": {"type": ["string", "null"], "description": "Accepted, unused."},
        "metadata": {"type": ["object", "null"], "additionalProperties": _TEXT, "description": "Accepted, unused."},
        "store": {"enum": [False, None], "description": "Nothing is stored."},
    }, ("messages",))


ERROR = obj({"error": obj({"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)},
                          ("message", "type", "param", "code"))}, ("error",))

_COUNT = {"type": "integer", "minimum": 0}
_USAGE = obj({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT,
              "prompt_tokens_details": obj({"cached_tokens": _COUNT}, ("cached_tokens",))},
             ("prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"))
_TIMINGS = obj({**{name: {"type": "number"} for name in ("load_ms", "encode_ms", "prefill_ms", "decode_ms")},
                "tokens_per_second": _or_null({"type": "number"}), "image_cache_hits": _COUNT,
                "peak_rss_bytes": _COUNT})
_TOKEN = {"token": _TEXT, "logprob": {"type": "number"}, "bytes": {"type": "array", "items": _COUNT}}
_LOGPROB = obj({**_TOKEN, "top_logprobs": {"type": "array", "items": obj(_TOKEN, tuple(_TOKEN))}},
               (*_TOKEN, "top_logprobs"))
_LOGPROBS = {"anyOf": [obj({"content": {"type": "array", "items": _LOGPROB}}, ("content",)), _NULL]}
_BOX = obj({"label": _TEXT, "box": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4,
                                    "description": "x1, y1, x2, y2 in 0 to 999 of the image's width and height."},
            "pixels": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4,
                       "description": "The same in pixels of the last image."}}, ("label", "box"))
# What every finished choice holds besides OpenAI's own; `loop` says what the repetition guard found.
GROUNDING = {"boxes": {"type": "array", "items": _BOX}, "box_problems": {"type": "array", "items": _TEXT},
             "image_size": {"anyOf": [{"type": "array", "items": _COUNT, "minItems": 2, "maxItems": 2}, _NULL]},
             "loop": _or_null(_TEXT)}
_REASON = {"enum": ["stop", "length"]}
_HEAD = {"id": _TEXT, "created": _COUNT, "model": _TEXT}

COMPLETION = obj({
    **_HEAD, "object": {"const": "chat.completion"}, "usage": _USAGE, "timings": _TIMINGS,
    "choices": {"type": "array", "minItems": 1, "maxItems": 1, "items": obj({
        "index": _COUNT, "message": obj({"role": {"const": "assistant"}, "content": _TEXT, "refusal": _NULL},
                                        ("role", "content", "refusal")),
        "finish_reason": _REASON, "logprobs": _LOGPROBS, **GROUNDING},
        ("index", "message", "finish_reason", "logprobs", *GROUNDING))},
}, (*_HEAD, "object", "choices", "usage", "timings"))

CHUNK = obj({
    **_HEAD, "object": {"const": "chat.completion.chunk"}, "usage": {"anyOf": [_USAGE, _NULL]}, "timings": _TIMINGS,
    "choices": {"type": "array", "maxItems": 1, "items": obj({
        "index": _COUNT, "delta": obj({"role": {"const": "assistant"}, "content": _TEXT}),
        "finish_reason": {"enum": [*_REASON["enum"], None]}, "logprobs": _LOGPROBS, **GROUNDING},
        ("index", "delta", "finish_reason"))},
}, (*_HEAD, "object", "choices"))

MODEL = obj({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT,
             "max_model_len": _COUNT}, ("id", "object", "created", "owned_by", "max_model_len"))
MODELS = obj({"object": {"const": "list"}, "data": {"type": "array", "items": MODEL}}, ("object", "data"))
HEALTH = obj({"status": {"const": "ok"}, "model": _TEXT, "backend": _TEXT, "running": _COUNT, "waiting": _COUNT},
             ("status", "model", "backend", "running", "waiting"))

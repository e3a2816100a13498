"""The body of /v1/chat/completions → what the model is asked; anything not understood is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from vl2.errors import VL2Error
from vl2.json_file import unique_keys
from vl2.prompt import IMAGE_PLACEHOLDER
from vl2.runtime import GenerationOptions
from vl2.runtime.constraints import Constraint
from vl2.runtime.serve.api_error import ApiError, refused, unknown_model
from vl2.runtime.serve.schema import MESSAGES, request_schema
from vl2.runtime.serve.settings import ServeSettings

DEFAULT_NEW_TOKENS = 512
_MOST_SIGNS, _MOST_VALUES, _MOST_LEVELS = 200_000, 10_000, 64
# Many times what the models hold; tokenizing megabytes only to refuse them would hold everybody up.
_MOST_CHARACTERS = 200_000
_ROLES = {"developer": "system"}
_PLAIN = ("temperature", "top_p", "seed", "repetition_penalty", "frequency_penalty", "presence_penalty")


@dataclass(frozen=True)
class Turn:
    """One message; `images` are the URLs of its parts, one for each `<image>` in the content."""

    role: str
    content: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatRequest:
    """What is asked and how it is answered."""

    turns: tuple[Turn, ...]
    options: GenerationOptions
    stream: bool
    include_usage: bool


class RequestReader:
    """Reads bodies under one server's limits. Thread-safe."""

    def __init__(self, settings: ServeSettings):
        self._settings = settings
        self._validator = Draft202012Validator(request_schema(settings.limits))
        self._of_role = {role: Draft202012Validator(schema) for schema in MESSAGES.values()
                         for role in schema["properties"]["role"]["enum"]}

    def read(self, body: bytes) -> ChatRequest:
        """Raises ApiError, 400 or 404, naming the field."""
        fields = _parse(body)
        self._check(fields)
        given = {name: value for name, value in fields.items() if value is not None}
        _check_together(given)
        name = self._settings.name
        if given.get("model", name) != name:
            raise unknown_model(given["model"], name)
        turns = tuple(_turn(message, index) for index, message in enumerate(given["messages"]))
        _check_turns(turns, self._settings.limits.images)
        usage = given.get("stream_options", {}).get("include_usage")
        return ChatRequest(turns, self._options(given), bool(given.get("stream")), bool(usage))

    def _check(self, fields: dict[str, Any]) -> None:
        # First each message by its own role, since "none of the alternatives fits" would name no field.
        for index, message in enumerate(_listed(fields.get("messages"))):
            role = message.get("role") if isinstance(message, dict) else None
            validator = self._of_role.get(role) if isinstance(role, str) else None
            if validator is None:
                expected = ", ".join(self._of_role)
                raise ApiError(400, f"messages[{index}] has the role {_short(role)}, expected one of {expected}",
                               f"messages[{index}].role")
            _refuse_first(validator, message, f"messages[{index}]")
        _refuse_first(self._validator, fields, "")

    def _options(self, given: dict[str, Any]) -> GenerationOptions:
        most = given.get("max_completion_tokens", given.get("max_tokens"))
        stop = given.get("stop", ())
        top = int(given.get("top_logprobs", 0)) if given.get("logprobs") else None
        try:
            plain = {name: given[name] for name in _PLAIN if name in given}
            if "seed" in plain:
                plain["seed"] = int(plain["seed"])
            return GenerationOptions(
                max_new_tokens=min(DEFAULT_NEW_TOKENS, self._settings.limits.new_tokens) if most is None else int(most),
                stop=(stop,) if isinstance(stop, str) else tuple(stop), top_logprobs=top,
                constraint=_constraint(given), **plain)
        except VL2Error as error:
            raise refused(error) from error


def _parse(body: bytes) -> dict[str, Any]:
    # Millions of empty lists in a body of 20 MB would take a gigabyte once they are objects.
    if sum(map(body.count, (b",", b"[", b"{"))) > _MOST_SIGNS:
        raise ApiError(400, f"the body has more than {_MOST_SIGNS:,} commas and brackets")
    try:
        fields = json.loads(body, object_pairs_hook=unique_keys, parse_constant=_no_number)
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body is a JSON {type(fields).__name__}, expected an object")
    _check_values(fields)
    return fields


def _check_values(fields: dict[str, Any]) -> None:
    """Raises ApiError for too many values, too deep nesting and texts that are none."""
    level: list[Any] = [fields]
    count = 0
    for _ in range(_MOST_LEVELS):
        count += len(level)
        if count > _MOST_VALUES:
            raise ApiError(400, f"the body has more than {_MOST_VALUES:,} values")
        for text in level:
            if isinstance(text, str) and not text.isascii():
                _check_text(text)
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
    raise ApiError(400, f"the body is nested deeper than {_MOST_LEVELS} levels")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, "a text holds half a surrogate pair, which is no character") from error


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else []


def _refuse_first(validator: Draft202012Validator, value: Any, place: str) -> None:
    """Raises ApiError about the deepest thing that is wrong, if something is."""
    errors = list(validator.iter_errors(value))
    if not errors:
        return
    error = max((leaf for error in errors for leaf in _leaves(error)), key=lambda leaf: len(leaf.absolute_path))
    where = place + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
    where = where.removeprefix(".")
    if error.validator == "additionalProperties":
        unknown = sorted(set(error.instance) - set(error.schema.get("properties", ())))
        names = ", ".join(f"{where}.{name}".removeprefix(".") for name in unknown)
        raise ApiError(400, f"unknown or unsupported: {names}", names.split(", ")[0], "unsupported_parameter")
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        raise ApiError(400, f"{where or 'the body'} has no {missing!r}", f"{where}.{missing}".removeprefix("."))
    raise ApiError(400, f"{where} is {_short(error.instance)}, expected {_expected(error)}", where)


def _expected(error: ValidationError) -> str:
    """What the schema wanted, in words."""
    if error.validator != "anyOf":
        return f"{error.validator} {_short(error.validator_value)}"
    kinds = [branch.get("properties", {}).get("type", {}).get("const") for branch in error.validator_value]
    named = ", ".join(kind for kind in kinds if kind)
    return f"one of the types {named}" if named else "another type"


def _leaves(error: ValidationError) -> Iterator[ValidationError]:
    """Of alternatives, the errors of that one which `type` or the kind of value chooses; otherwise the error itself."""
    inner = [child for child in error.context or () if not _of_another_kind(child, error)]
    if error.validator != "anyOf" or not inner:
        yield error
    for child in inner if error.validator == "anyOf" else ():
        yield from _leaves(child)


def _of_another_kind(child: ValidationError, parent: ValidationError) -> bool:
    """Whether `child` belongs to an alternative of another kind than the value's own."""
    branch = parent.validator_value[child.schema_path[0]]
    value = parent.instance
    kinds = branch.get("type", [])
    if not any(Draft202012Validator.TYPE_CHECKER.is_type(value, kind)
               for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return True
    named = branch.get("properties", {}).get("type", {}).get("const")
    return named is not None and value.get("type") != named


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_together(given: dict[str, Any]) -> None:
    """Fields that contradict each other or lack their partner."""
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise ApiError(400, "max_tokens and max_completion_tokens are both given, expected one", "max_tokens")
    for name, partner in (("stream_options", "stream"), ("top_logprobs", "logprobs")):
        if name in given and not given.get(partner):
            raise ApiError(400, f"{name} is given without {partner}", name)
    forms = [name for name in ("response_format", "guided_regex", "boxes") if given.get(name)
             and given[name] != {"type": "text"}]
    if len(forms) > 1:
        raise ApiError(400, f"{' and '.join(forms)} are given, expected one of them", forms[1])


def _constraint(given: dict[str, Any]) -> Constraint | None:
    form = given.get("response_format", {"type": "text"})
    if form["type"] == "json_schema":
        return Constraint("json_schema", json.dumps(form["json_schema"]["schema"], ensure_ascii=False))
    if form["type"] == "json_object":
        return Constraint("json_object")
    if "guided_regex" in given:
        return Constraint("regex", given["guided_regex"])
    return Constraint("boxes") if given.get("boxes") else None


def _turn(message: dict[str, Any], index: int) -> Turn:
    role = _ROLES.get(message["role"], message["role"])
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    images = tuple(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    text = _placed(parts)
    if role == "user" and not text.replace(IMAGE_PLACEHOLDER, "").strip():
        raise ApiError(400, f"messages[{index}] has no text", f"messages[{index}].content")
    places = text.count(IMAGE_PLACEHOLDER)
    if places != len(images):
        raise ApiError(400, f"messages[{index}] has {places} {IMAGE_PLACEHOLDER} and {len(images)} images, expected "
                       "one for each image, or none", f"messages[{index}].content")
    return Turn(role, text, images)


def _placed(parts: list[dict[str, Any]]) -> str:
    """The text with an `<image>` for each image, as `vl2 run` places them; images amid text stay where they stand."""
    kinds = [part["type"] for part in parts]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if any(IMAGE_PLACEHOLDER in text for text in texts):
        return "\n".join(texts)
    places = [index for index, kind in enumerate(kinds) if kind == "text"]
    if not places or "image_url" not in kinds[places[0]:places[-1]]:
        return f"{IMAGE_PLACEHOLDER}\n" * kinds.count("image_url") + "\n".join(texts)
    return "".join(f"{IMAGE_PLACEHOLDER}\n" if part["type"] == "image_url" else part["text"] for part in parts)


def _check_turns(turns: tuple[Turn, ...], most_images: int) -> None:
    """The order that the model's template has."""
    for index, turn in enumerate(turns):
        if turn.role == "system" and index:
            raise ApiError(400, f"messages[{index}] is a system message, only the first may be one",
                           f"messages[{index}].role")
    if turns[-1].role != "user":
        raise ApiError(400, f"the last message is from the {turns[-1].role}, expected the user", "messages")
    characters = sum(len(turn.content) for turn in turns)
    if characters > _MOST_CHARACTERS:
        raise ApiError(400, f"the texts have {characters:,} characters, expected at most {_MOST_CHARACTERS:,}",
                       "messages")
    images = sum(len(turn.images) for turn in turns)
    if images > most_images:
        raise ApiError(400, f"{images} images, this server takes {most_images} a request", "messages")

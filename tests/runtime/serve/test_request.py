"""Bodies of requests: what is understood, and that everything else is refused by its name."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage

from tests.runtime.serve.conftest import question, user
from vl2.runtime import GenerationOptions
from vl2.runtime.constraints import Constraint
from vl2.runtime.serve.api_error import ApiError
from vl2.runtime.serve.request import ChatRequest, RequestReader
from vl2.runtime.serve.settings import Limits, ServeSettings

READER = RequestReader(ServeSettings("small", limits=Limits(new_tokens=600, images=2)))
TEXT = {"type": "text", "text": "Q"}
IMAGE = {"type": "image_url", "image_url": {"url": "u"}}


def read(body: Any) -> ChatRequest:
    return READER.read(json.dumps(body).encode())


def placed(*parts: dict) -> str:
    return read({"messages": [{"role": "user", "content": list(parts)}]}).turns[0].content


def test_every_field_arrives() -> None:
    request = read({
        "model": "small", "messages": [{"role": "developer", "content": "Be brief."}, user("A", "u1"),
                                       {"role": "assistant", "content": "B", "refusal": None, "tool_calls": None},
                                       {"role": "user", "content": "C"}],
        "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 7, "temperature": 0.5,
        "top_p": 0.9, "seed": 3, "repetition_penalty": 1.1, "frequency_penalty": -1, "presence_penalty": 2,
        "stop": ["x", "y"], "logprobs": True, "top_logprobs": 4, "n": 1, "guided_regex": "a+", "user": "me",
        "metadata": {"a": "b"}, "store": False, "boxes": None})
    assert [(turn.role, turn.content, turn.images) for turn in request.turns] == [
        ("system", "Be brief.", ()), ("user", "<image>\nA", ("u1",)), ("assistant", "B", ()), ("user", "C", ())]
    assert request.stream and request.include_usage
    assert request.options == GenerationOptions(
        7, 0.5, 0.9, 1.1, ("x", "y"), 3, frequency_penalty=-1, presence_penalty=2, top_logprobs=4,
        constraint=Constraint("regex", "a+"))


def test_what_the_official_client_dumps_is_accepted() -> None:
    said = ChatCompletionMessage(role="assistant", content="x").model_dump()
    assert {"annotations", "audio", "function_call", "refusal", "tool_calls"} <= said.keys()
    asked = {"role": "user", "content": "a", "name": None, "tool_calls": None}
    request = read({"messages": [asked, said, asked], "response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "description": None, "strict": None, "schema": {"type": "object"}}}})
    assert [turn.content for turn in request.turns] == ["a", "x", "a"]


def test_without_choices_the_answer_is_that_of_vl2_run() -> None:
    fields = ("stream", "max_tokens", "temperature", "stop", "logprobs", "response_format", "seed", "n")
    for body in (question(max_tokens=None), question(**dict.fromkeys(fields))):
        request = read(body)
        assert request.options == GenerationOptions() and not request.stream


@pytest.mark.parametrize("fields, constraint", [
    ({"response_format": {"type": "text"}}, None), ({"boxes": False}, None),
    ({"response_format": {"type": "json_object"}}, Constraint("json_object")),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
     Constraint("json_schema", '{"type": "object"}')),
    ({"boxes": True, "response_format": {"type": "text"}}, Constraint("boxes")),
])
def test_forms_of_answers_become_constraints(fields: dict, constraint: Constraint | None) -> None:
    assert read(question(**fields)).options.constraint == constraint


def test_images_come_first_as_in_vl2_run_unless_they_stand_between_texts() -> None:
    assert placed(IMAGE, TEXT) == placed(TEXT, IMAGE) == "<image>\nQ"
    assert placed(TEXT, TEXT, IMAGE, IMAGE) == "<image>\n<image>\nQ\nQ"
    assert placed({"type": "text", "text": "1: "}, IMAGE, {"type": "text", "text": "2: "}, IMAGE, TEXT) == (
        "1: <image>\n2: <image>\nQ")
    assert placed(IMAGE, {"type": "text", "text": "See <image> there"}) == "See <image> there"


MESSAGE = [{"role": "user", "content": "x"}]
REFUSED = [
    ({}, "messages", "no 'messages'"), ({"messages": []}, "messages", "expected minItems 1"),
    ({"messages": MESSAGE, "tools": []}, "tools", "unknown or unsupported: tools"),
    ({"messages": MESSAGE, "logit_bias": {}, "audio": 1}, "audio", "unsupported: audio, logit_bias"),
    ({"messages": [{**MESSAGE[0], "name": "me"}]}, "messages[0].name", "is 'me', expected type 'null'"),
    ({"messages": [{**MESSAGE[0], "weight": None}]}, "messages[0].weight", "unknown or unsupported"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "role 'tool', expected one of system"),
    ({"messages": [3]}, "messages[0].role", "has the role None"),
    ({"messages": {"role": "user"}}, "messages", "expected type 'array'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "has no 'content'"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "expected another type"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]",
     "one of the types text, image_url"),
    ({"messages": [{"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {"url": 3}}]}]},
     "messages[0].content[1].image_url.url", "is 3, expected type 'string'"),
    ({"messages": [{"role": "user", "content": [TEXT, {**IMAGE, "image_url": {"url": "u", "detail": "low"}}]}]},
     "messages[0].content[1].image_url.detail", "is 'low', expected enum"),
    ({"messages": [{"role": "system", "content": [IMAGE]}]}, "messages[0].content[0]", "one of the types text"),
    ({"messages": [{"role": "user", "content": "  "}]}, "messages[0].content", "has no text"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content", "has no text"),
    ({"messages": [{"role": "user", "content": "a <image>"}]}, "messages[0].content", "1 <image> and 0 images"),
    ({"messages": [*MESSAGE, {"role": "system", "content": "x"}, *MESSAGE]}, "messages[1].role", "only the first"),
    ({"messages": [*MESSAGE, {"role": "assistant", "content": "x"}]}, "messages", "assistant, expected the user"),
    ({"messages": [user("x", "u", "u"), user("x", "u")]}, "messages", "3 images, this server takes 2"),
    ({"messages": MESSAGE, "max_tokens": 601}, "max_tokens", "601, expected maximum 600"),
    ({"messages": MESSAGE, "max_tokens": True}, "max_tokens", "expected type"),
    ({"messages": MESSAGE, "max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "both given"),
    ({"messages": MESSAGE, "temperature": -1}, "temperature", "expected minimum 0"),
    ({"messages": MESSAGE, "top_p": 0}, "top_p", "expected exclusiveMinimum 0"),
    ({"messages": MESSAGE, "n": 2}, "n", "expected maximum 1"),
    ({"messages": MESSAGE, "store": True}, "store", "expected enum"),
    ({"messages": MESSAGE, "stop": [""]}, "stop[0]", "expected minLength 1"),
    ({"messages": MESSAGE, "stream_options": {"include_usage": True}}, "stream_options", "without stream"),
    ({"messages": MESSAGE, "stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown or unsupported"),
    ({"messages": MESSAGE, "top_logprobs": 2}, "top_logprobs", "without logprobs"),
    ({"messages": MESSAGE, "boxes": True, "guided_regex": "a"}, "boxes", "guided_regex and boxes are given"),
    ({"messages": MESSAGE, "response_format": {"type": "xml"}}, "response_format", "text, json_object, json_schema"),
    ({"messages": MESSAGE, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
     "response_format.json_schema.schema", "has no 'schema'"),
    ([], None, "expected an object"), ("x", None, "expected an object"), (None, None, "expected an object"),
]


@pytest.mark.parametrize("body, param, reason", REFUSED, ids=[str(body)[:70] for body, _, _ in REFUSED])
def test_what_is_not_understood_is_refused_by_name(body: Any, param: str | None, reason: str) -> None:
    with pytest.raises(ApiError) as refusal:
        read(body)
    assert (refusal.value.status, refusal.value.param) == (400, param)
    assert reason in refusal.value.message


@pytest.mark.parametrize("body, reason", [
    (b"", "no JSON"), (b"{", "no JSON"), (b"\xff\xfe", "no JSON"), (b'{"n": NaN}', "NaN is no JSON number"),
    (b'{"n": 1, "n": 1}', "'n' occurs twice"), (b"[" * 100_000, "nested too deeply|no JSON"),
    (b"[" * 300_000, "commas and brackets"), (b'{"x": ' + b"[" * 70 + b"]" * 70 + b"}", "deeper than 64 levels"),
    (json.dumps({"x": [[]] * 10_000}).encode(), "more than 10,000 values"),
    (json.dumps({"messages": [{"role": "user", "content": "x" * 200_001}]}).encode(), "200,001 characters"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate"),
    (b'{"\\udfff": 1}', "half a surrogate"),
    (b'{"seed": 1' + b"0" * 5000 + b"}", "no JSON"), (b'{"temperature": 1e400}', "inf, expected maximum"),
])
def test_bodies_that_are_no_json_are_refused(body: bytes, reason: str) -> None:
    with pytest.raises(ApiError) as refusal:
        READER.read(body)
    assert refusal.value.status == 400 and any(part in refusal.value.message for part in reason.split("|"))


def test_another_model_is_not_found() -> None:
    with pytest.raises(ApiError, match="'gpt-4' is not served, expected 'small'") as refusal:
        read(question(model="gpt-4"))
    assert (refusal.value.status, refusal.value.code) == (404, "model_not_found")


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["messages", "role", "content", "type", "text", "image_url", "url", "stop", "n",
                                         "response_format", "stream_options", "x"]), inner, max_size=4))


@given(JSON)
def test_no_json_brings_the_reader_down(value: Any) -> None:
    for body in (value, {"messages": value}, {"messages": [{"role": "user", "content": value}]},
                 question(response_format=value), question(stop=value, seed=value)):
        try:
            read(body)
        except ApiError as error:
            assert error.status in (400, 404)

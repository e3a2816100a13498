"""The description of the server is true of it."""

import pytest
from jsonschema import Draft202012Validator

from tests.runtime.serve.conftest import CHAT, InMemory, question
from vl2.runtime.serve.openapi import describe
from vl2.runtime.serve.schema import HEALTH, MODEL, MODELS, request_schema
from vl2.runtime.serve.settings import Limits, ServeSettings


def schemas(value) -> list[dict]:
    """Every schema of the description, by its key."""
    if isinstance(value, list):
        return [schema for item in value for schema in schemas(item)]
    if not isinstance(value, dict):
        return []
    own = [value["schema"]] if isinstance(value.get("schema"), dict) else []
    return own + [schema for item in value.values() for schema in schemas(item)]


def test_every_described_path_answers_in_its_described_form(served) -> None:
    client: InMemory = served()
    found = client.request("GET", "/openapi.json").json()
    for path, schema in (("/health", HEALTH), ("/v1/models", MODELS), ("/v1/models/small", MODEL)):
        Draft202012Validator(schema).validate(client.request("GET", path).json())
    assert client.request("GET", "/metrics").headers["content-type"].startswith("text/plain")
    described = {(path, method.upper()) for path, methods in found["paths"].items() for method in methods}
    assert described == {(CHAT, "POST"), ("/v1/models", "GET"), ("/v1/models/{model}", "GET"), ("/health", "GET"),
                         ("/metrics", "GET")}


def test_all_schemas_are_schemas() -> None:
    found = schemas(describe(ServeSettings("small")))
    assert len(found) > 20
    for schema in found:
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("tokens", [(), ("a" * 20,)])
def test_the_token_and_its_refusal_are_described_where_they_hold(tokens: tuple[str, ...]) -> None:
    paths = describe(ServeSettings("small", tokens))["paths"]
    for path, methods in paths.items():
        for operation in methods.values():
            guarded = bool(tokens) and path != "/health"
            assert ("security" in operation, "401" in operation["responses"]) == (guarded, guarded)
            assert ("403" in operation["responses"]) == (not tokens)


def test_the_described_limits_are_those_that_hold(served) -> None:
    assert request_schema(Limits(new_tokens=7))["properties"]["max_tokens"]["maximum"] == 7
    client = served(limits={"new_tokens": 7})
    assert client.ask(question(max_tokens=8)).status_code == 400
    without = client.ask(question(max_tokens=None)).json()
    assert without["usage"]["completion_tokens"] == 7

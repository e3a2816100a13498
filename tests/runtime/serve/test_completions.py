"""Answers of the endpoint: equal to the model's own, in both forms, within every limit."""

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from tests.runtime.serve.conftest import CHAT, PATIENCE, InMemory, data_url, gated_model_of, png, question, user
from tests.runtime.small_bundle import numpy_model_of
from vl2.runtime import GenerationOptions
from vl2.runtime.answer import Answer
from vl2.runtime.grounding import Box
from vl2.runtime.serve import body as reading
from vl2.runtime.serve.reply import DONE, Reply
from vl2.runtime.serve.schema import CHUNK, COMPLETION, ERROR

SIZES = ((60, 40), (33, 70))


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end as OpenAI's do."""
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == DONE.decode().strip()
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("fields, options", [
    ({}, GenerationOptions(6)),
    ({"temperature": 1.5, "seed": 4, "top_p": 0.9}, GenerationOptions(6, 1.5, 0.9, seed=4)),
    ({"repetition_penalty": 1.3, "frequency_penalty": 1, "presence_penalty": 0.5},
     GenerationOptions(6, repetition_penalty=1.3, frequency_penalty=1, presence_penalty=0.5)),
])
def test_an_answer_is_the_one_the_model_gives(served, shared_bundle: Path, fields: dict, options) -> None:
    images = [Image.new("RGB", size, "green") for size in SIZES]
    urls = [data_url(png(size, "green")) for size in SIZES]
    client, model = served(), numpy_model_of(shared_bundle)
    for count in range(3):
        expected = model.ask("What is shown?", images[:count], options)
        body = question("What is shown?", *urls[:count], **fields)
        whole = client.ask(body).json()
        chunks = events(client.ask({**body, "stream": True}).text)
        streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert whole["choices"][0]["message"]["content"] == streamed == expected.text
        assert whole["usage"]["completion_tokens"] == len(expected.token_ids)
        assert whole["usage"]["prompt_tokens"] == expected.prompt_tokens
        assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"


def test_both_forms_are_as_described(served) -> None:
    client = served()
    body = question("What?", data_url(png()), logprobs=True, top_logprobs=3)
    whole = client.ask(body).json()
    Draft202012Validator(COMPLETION).validate(whole)
    assert len(whole["choices"][0]["logprobs"]["content"]) == 6
    chunks = events(client.ask({**body, "stream": True, "stream_options": {"include_usage": True}}).text)
    for chunk in chunks:
        Draft202012Validator(CHUNK).validate(chunk)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant" and chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6 and all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-2]["choices"][0]["logprobs"] == whole["choices"][0]["logprobs"]
    assert not any("usage" in chunk for chunk in events(client.ask({**body, "stream": True}).text))
    Draft202012Validator(ERROR).validate(client.ask({}).json())


def test_boxes_come_in_both_scales_with_what_could_not_be_read() -> None:
    answer = Answer(text="x", token_ids=(1,), prompt_tokens=3, reused_tokens=2, boxes=(Box("a", 0, 333, 999, 999),),
                    box_problems=("one",), image_size=(100, 60), stop_reason="loop", load_ms=0, encode_ms=0,
                    prefill_ms=0, decode_ms=0, tokens_per_second=None, peak_rss_bytes=1, loop="what repeats")
    choice = Reply("n", "m").whole(answer)["choices"][0]
    assert choice["boxes"] == [{"label": "a", "box": [0, 333, 999, 999], "pixels": [0, 20, 100, 60]}]
    assert (choice["box_problems"], choice["image_size"]) == (["one"], [100, 60])
    assert (choice["finish_reason"], choice["loop"]) == ("length", "what repeats")
    Draft202012Validator(COMPLETION).validate(Reply("n", "m").whole(answer))
    Draft202012Validator(CHUNK).validate(events(Reply("n", "m").last(answer).decode())[0])


def test_a_stop_string_ends_an_answer_before_it(served) -> None:
    client = served()
    free = client.ask(question()).json()["choices"][0]["message"]["content"]
    stopped = client.ask(question(stop=free[1:3])).json()["choices"][0]
    assert stopped["message"]["content"] == free[:free.index(free[1:3])] and stopped["finish_reason"] == "stop"


def test_a_second_question_about_an_image_runs_the_vision_graph_no_more(served, shared_bundle: Path) -> None:
    model = numpy_model_of(shared_bundle)
    client, url = served(model=model), data_url(png())
    client.ask(question("What is shown?", url))
    model.engine.backend.runs.clear()
    second = client.ask(question("And where?", url)).json()
    assert "vision" not in dict(model.engine.backend.runs)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 20


@pytest.mark.parametrize("headers, status", [
    ({"Content-Type": "text/plain"}, 415), ({}, 415), ({"Content-Type": "application/json; charset=utf-8"}, 200),
])
def test_only_json_is_taken_since_other_sites_cannot_send_it(served, headers: dict, status: int) -> None:
    done = served().request("POST", CHAT, content=json.dumps(question()), headers=headers)
    assert done.status_code == status


def test_a_body_past_the_limit_is_refused_announced_or_not(served) -> None:
    client = served(limits={"body_bytes": 500})
    long = question("x" * 600)
    assert client.ask(long).status_code == 413

    async def pieces():
        for _ in range(10):
            yield b"x" * 100

    headers = {"Content-Type": "application/json"}
    assert client.request("POST", CHAT, content=pieces(), headers=headers).status_code == 413
    assert client.ask(question("x")).status_code == 200


def test_all_bodies_together_have_a_bound_that_is_given_back(served, monkeypatch) -> None:
    client = served(limits={"pending_bytes": 1_000, "body_bytes": 500}, fetch=lambda url: png(compress_level=0),
                    image_hosts=frozenset({"example.org"}))
    monkeypatch.setattr(reading, "FREE_BYTES", 0)
    with client.service.app._app.routes[0].endpoint._pending.account("another") as another:
        another.add(900)
        for _ in range(3):
            done = client.ask(question("x" * 200))
            assert done.status_code == 429 and done.headers["retry-after"] == "5"
    for _ in range(3):
        assert client.ask(question("x" * 200)).status_code == 200
        # An image of 3,800 bytes, for which there will never be room.
        done = client.ask(question("What?", "https://example.org/a.png"))
        assert done.status_code == 413 and "with its images" in done.json()["error"]["message"]


def test_a_body_that_does_not_come_is_given_up(served) -> None:
    client = served(limits={"stall_seconds": 0.05})

    async def never():
        yield b"{"
        await asyncio.sleep(PATIENCE)

    done = client.request("POST", CHAT, content=never(), headers={"Content-Type": "application/json"})
    assert done.status_code == 408


def test_a_prompt_that_is_too_long_is_the_clients_error(served) -> None:
    done = served().ask(question("word " * 2000, stream=True))
    assert done.status_code == 400 and "the model holds 700" in done.json()["error"]["message"]


# With a gate before the decoder, the tests choose when the model computes.

class Gated:
    """A server whose model stands still, and requests to it that go on in the background."""

    def __init__(self, served, bundle: Path, **limits: Any):
        self.model, self.backend = gated_model_of(bundle)
        self.client: InMemory = served(model=self.model, limits=limits)
        self.worker = self.client.service.worker
        self.done: dict[str, httpx.Response] = {}
        self.threads: list[threading.Thread] = []

    def begin(self, name: str, body: dict[str, Any], address: str = "1.1.1.1") -> None:
        """Sends a request and returns when it waits or runs."""
        before = self.worker.waiting() + self.worker.running()
        self.threads.append(threading.Thread(target=lambda: self.done.update({name: self.ask(body, address)})))
        self.threads[-1].start()
        wait_until(lambda: self.worker.waiting() + self.worker.running() > before)

    def ask(self, body: dict[str, Any], address: str = "1.1.1.1") -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.client.service.app, client=(address, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.post(CHAT, json=body)

        return asyncio.run(send())

    def open(self) -> dict[str, httpx.Response]:
        self.backend.gate.set()
        for thread in self.threads:
            thread.join(PATIENCE)
        return self.done


def wait_until(holds) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


@pytest.fixture
def gated(served, shared_bundle: Path):
    made = []

    def start(**limits: Any) -> Gated:
        made.append(Gated(served, shared_bundle, **limits))
        made[-1].backend.gate.clear()
        return made[-1]

    yield start
    for server in made:
        server.open()


def test_a_full_queue_answers_429_with_a_time_and_loses_nobody(gated) -> None:
    server = gated(queued=2)
    for name in ("running", "first", "second"):
        server.begin(name, question(name))
    refused = server.ask(question("third"))
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert [response.status_code for response in server.open().values()] == [200] * 3


def test_one_client_cannot_fill_the_queue(gated) -> None:
    server = gated(queued=3, queued_per_client=1)
    server.begin("running", question(), "1.1.1.1")
    server.begin("waiting", question(), "1.1.1.1")
    assert "of your requests" in server.ask(question(), "1.1.1.1").json()["error"]["message"]
    server.begin("another", question(), "2.2.2.2")
    assert [response.status_code for response in server.open().values()] == [200] * 3


def test_clients_are_answered_in_turn(gated) -> None:
    server = gated()
    order = []
    complete = server.model.complete
    server.model.complete = lambda messages, options: order.append(messages[-1].content) or complete(messages, options)
    for name, address in (("a1", "1.1.1.1"), ("a2", "1.1.1.1"), ("a3", "1.1.1.1"), ("b1", "2.2.2.2")):
        server.begin(name, question(name), address)
    server.open()
    assert order == ["a1", "a2", "b1", "a3"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_limit_ends_what_waits_and_what_runs(gated, stream: bool) -> None:
    server = gated(request_seconds=0.3)
    server.begin("running", question(stream=stream))
    server.begin("waiting", question(stream=stream))
    for thread in server.threads:
        thread.join(PATIENCE)
    for response in server.done.values():
        assert response.status_code == 504 and response.json()["error"]["type"] == "timeout_error"
    assert server.worker.waiting() == 0
    server.backend.gate.set()
    wait_until(lambda: not server.worker.running())
    assert server.ask(question()).status_code == 200


def test_stopping_answers_all_who_wait(gated) -> None:
    server = gated()
    server.begin("running", question("r"))
    server.begin("waiting", question("w"))
    server.worker.close_queue()
    wait_until(lambda: "waiting" in server.done)
    assert server.done["waiting"].status_code == server.ask(question()).status_code == 503
    assert server.open()["running"].status_code == 200


def test_a_client_that_does_not_read_is_given_up_and_holds_nobody_up(gated) -> None:
    server = gated(stall_seconds=0.2)

    async def slow() -> None:
        body = [{"type": "http.request", "body": json.dumps(question(stream=True)).encode()}]
        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "client": ("3.3.3.3", 1),
                 "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")]}

        async def receive():
            return body.pop() if body else await asyncio.Event().wait()

        async def send(message):
            await asyncio.Event().wait()

        await server.client.service.app(scope, receive, send)

    server.backend.gate.set()
    started = time.monotonic()
    reader = threading.Thread(target=lambda: asyncio.run(slow()))
    reader.start()
    assert server.ask(question("other")).status_code == 200
    reader.join(PATIENCE)
    assert not reader.is_alive() and time.monotonic() - started < PATIENCE
    assert 'status="499"} 1.0' in server.client.request("GET", "/metrics").text


def test_interleaved_conversations_get_their_own_answers(served, shared_bundle: Path) -> None:
    model, client = numpy_model_of(shared_bundle), served(limits={"queued_per_client": 32})
    topics = [f"topic number {index}" for index in range(6)]
    expected = {topic: model.ask(topic, options=GenerationOptions(6)).text for topic in topics}
    assert len(set(expected.values())) > 2, "answers must tell the questions apart"

    async def all_at_once() -> list[tuple[str, str]]:
        transport = httpx.ASGITransport(client.service.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            async def one(topic: str) -> tuple[str, str]:
                body = {"messages": [user(topic)], "max_tokens": 6}
                return topic, (await http.post(CHAT, json=body)).json()["choices"][0]["message"]["content"]

            return await asyncio.gather(*[one(topic) for topic in topics * 4])

    for topic, text in asyncio.run(all_at_once()):
        assert text == expected[topic]


def test_constraints_hold_and_bad_ones_are_the_clients_error(served) -> None:
    client = served()
    done = client.ask(question(guided_regex="(yes|no)!", max_tokens=9, stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(done.text)) in ("yes!", "no!")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
              "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    refused = ({"guided_regex": "(("}, {"response_format": {**form, "json_schema": {"schema": {"type": "foo"}}}},
               {"response_format": {**form, "json_schema": {"schema": {"$ref": "#"}}}})
    for fields in refused:
        done = client.ask(question(**fields))
        assert done.status_code == 400 and "constraint" in done.json()["error"]["message"], done.text
        assert "\n" not in done.json()["error"]["message"] and "state>" not in done.text
    text = client.ask(question(response_format=form, max_tokens=60)).json()["choices"][0]["message"]["content"]
    assert text.startswith('{"a": ')


def test_a_body_that_comes_in_drops_has_an_end_too(served) -> None:
    client = served(limits={"request_seconds": 0.2})

    async def drops():
        while True:
            yield b" "
            await asyncio.sleep(0.02)

    done = client.request("POST", CHAT, content=drops(), headers={"Content-Type": "application/json"})
    assert done.status_code == 408

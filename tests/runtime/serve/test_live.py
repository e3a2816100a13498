"""A server on a real port: OpenAI's own client, clients that leave, connections that say nothing, the command line."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from starlette.responses import Response
from starlette.routing import Route

from tests.runtime.serve.conftest import (
    CHAT,
    PATIENCE,
    GatedBackend,
    data_url,
    gated_model_of,
    on_a_port,
    png,
    question,
    user,
    with_limits,
)
from tests.runtime.serve.test_completions import wait_until
from tests.runtime.small_bundle import numpy_model_of
from vl2.runtime import GenerationOptions
from vl2.runtime.serve import app, server
from vl2.runtime.serve.app import Service

RUN = [sys.executable, "-c", "import sys; from vl2.cli import main; sys.exit(main())"]


@pytest.fixture
def live(shared_bundle: Path) -> Iterator[tuple[str, Service, GatedBackend]]:
    model, backend = gated_model_of(shared_bundle)
    with on_a_port(model, with_limits({"queued_per_client": 32}, {})) as (url, service):
        yield url, service, backend
        backend.gate.set()


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none is needed", max_retries=0, timeout=PATIENCE)


def test_the_official_client_asks_streams_and_talks_on(live, shared_bundle: Path) -> None:
    url, _, _ = live
    client, expected = client_of(url), numpy_model_of(shared_bundle).chat()
    assert [model.id for model in client.models.list()] == ["small"] and client.models.retrieve("small").id == "small"
    messages = [user("What is shown?", data_url(png()))]
    first = client.chat.completions.create(model="small", messages=messages, max_tokens=6)
    from PIL import Image

    options = GenerationOptions(6)
    assert first.choices[0].message.content == expected.ask("What is shown?", [Image.new("RGB", (40, 30), "red")],
                                                            options).text
    # The message goes back as the client's own object, whatever it puts into it.
    messages += [first.choices[0].message, user("And why?")]
    stream = client.chat.completions.create(model="small", messages=messages, max_tokens=6, stream=True,
                                            stream_options={"include_usage": True}, logprobs=True, top_logprobs=1,
                                            extra_body={"boxes": False, "repetition_penalty": 1.0})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == 6
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 20
    assert len(chunks[-2].choices[0].logprobs.content) == 6


def test_the_official_client_understands_the_refusals(live) -> None:
    client = client_of(live[0])
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="small", messages=[user("x")], tools=[])
    assert refused.value.param == "tools" and refused.value.code == "unsupported_parameter"
    with pytest.raises(openai.NotFoundError, match="is not served"):
        client.chat.completions.create(model="other", messages=[user("x")])


def leave(url: str, body: dict, until) -> None:
    """Sends a request and closes the connection as soon as `until()` holds."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_until(until)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_worker_and_its_place_in_the_queue(live, stream: bool) -> None:
    url, service, backend = live
    backend.gate.clear()
    worker = service.worker
    leave(url, question("running", stream=stream, max_tokens=600), backend.reached.is_set)
    leave(url, question("waiting", stream=stream), lambda: worker.waiting() == 1)
    wait_until(lambda: worker.waiting() == 0)
    before = len(backend.runs)
    backend.gate.set()
    wait_until(lambda: worker.running() == 0)
    # The run that stood at the gate ends, and after it no token is computed for nobody.
    assert len(backend.runs) - before <= 2
    assert httpx.post(url + CHAT, json=question(), timeout=PATIENCE).status_code == 200
    assert 'status="499"} 2.0' in httpx.get(url + "/metrics", timeout=PATIENCE).text


def test_pieces_arrive_while_the_answer_is_made(live) -> None:
    url, _, backend = live
    backend.shut_after = 4
    with httpx.stream("POST", url + CHAT, json=question(stream=True), timeout=PATIENCE) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert '"role":"assistant"' in next(lines)
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["delta"]["content"]
        assert service_is_busy(url)
        backend.gate.set()
        assert list(lines)[-1] == "data: [DONE]"


def service_is_busy(url: str) -> bool:
    return httpx.get(f"{url}/health", timeout=PATIENCE).json()["running"] == 1


def test_a_connection_without_a_request_is_closed(live, shared_bundle: Path, monkeypatch) -> None:
    monkeypatch.setattr(server, "_SILENT_SECONDS", 0.3)
    with on_a_port(numpy_model_of(shared_bundle), with_limits(None, {})) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as silent:
            assert silent.recv(1) == b""
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as dripping:
            for byte in b"GET / HT":
                try:
                    dripping.sendall(bytes([byte]))
                except OSError:
                    return
                time.sleep(0.1)
            assert dripping.recv(1) == b""


def test_a_head_without_end_is_refused(live) -> None:
    host, port = live[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000)
        assert b" 400 " in connection.recv(100)


LARGE = b"x" * (8 << 20)  # more than the system's buffers hold
ASK_LARGE = b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def large_page(monkeypatch) -> None:
    route = Route("/large", lambda _: Response(LARGE), methods=["GET"])
    monkeypatch.setattr(app, "page_routes", lambda: [route])


def asking(url: str, request: bytes) -> socket.socket:
    """A connection that has asked; by its small window the server soon feels that nobody reads."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(PATIENCE)
    connection.connect((host, int(port)))
    connection.sendall(request)
    return connection


@pytest.mark.parametrize("requests", [1, 100], ids=["one answer", "pipelined"])
def test_who_does_not_read_keeps_no_connection(shared_bundle: Path, large_page, requests: int) -> None:
    limits = {"connections": 4, "stall_seconds": 3}
    with on_a_port(numpy_model_of(shared_bundle), with_limits(limits, {})) as (url, _):
        held = [asking(url, ASK_LARGE * requests) for _ in range(3)]
        wait_until(lambda: httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 503)
        wait_until(lambda: httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 200)
        for connection in held:
            connection.close()


def test_who_reads_slowly_gets_everything(shared_bundle: Path, large_page) -> None:
    """For longer than the limit, at a rate at which the buffers of the system itself would not run dry in it."""
    with (on_a_port(numpy_model_of(shared_bundle), with_limits({"stall_seconds": 2}, {})) as (url, _),
          asking(url, ASK_LARGE) as connection):
        began, received = time.monotonic(), 0
        while received < len(LARGE):
            part = connection.recv(1 << 17)
            assert part, f"the connection was ended after {time.monotonic() - began:.1f} s and {received} bytes"
            received += len(part)
            if time.monotonic() - began < 5:
                time.sleep(len(part) / 120_000)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_outlasts_the_grace_ends_as_an_error_of_the_service(
        shared_bundle: Path, monkeypatch, caplog, stream: bool) -> None:
    monkeypatch.setattr(server, "GRACE_SECONDS", 2)
    model, backend = gated_model_of(shared_bundle)
    answered: list[httpx.Response] = []

    def ask(url: str) -> None:
        answered.append(httpx.post(url + CHAT, json=question(stream=stream, max_tokens=300), timeout=PATIENCE))
        backend.gate.set()

    with on_a_port(model, with_limits(None, {})) as (url, _):
        backend.shut_after = 4
        client = threading.Thread(target=ask, args=(url,))
        client.start()
        assert backend.reached.wait(PATIENCE)
    client.join(PATIENCE)
    last = answered[0].text.strip().split("\n")[-1].removeprefix("data: ")
    assert answered[0].status_code == (200 if stream else 503)
    assert "shutting down" in json.loads(last)["error"]["message"] and "Traceback" not in caplog.text


def test_a_request_that_is_still_being_sent_at_the_end_is_refused_in_order(shared_bundle: Path, monkeypatch,
                                                                           caplog) -> None:
    monkeypatch.setattr(server, "GRACE_SECONDS", 1)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{{"
    with on_a_port(numpy_model_of(shared_bundle), with_limits(None, {})) as (url, _):
        connection = asking(url, head.encode())
        time.sleep(0.3)  # nothing tells from outside that the head has been read
    with connection:
        assert connection.recv(20).startswith(b"HTTP/1.1 503") and "Traceback" not in caplog.text


# The verb itself, as a process.

@pytest.fixture
def process(shared_bundle: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    started = subprocess.Popen([*RUN, "serve", shared_bundle, "--port", "0", "--name", "m"], stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "VL2_SERVE_TOKEN": "t" * 20})
    for line in started.stderr:
        if found := re.search(r"serving m at (http://\S+) \(1 tokens\)", line):
            break
    yield found[1], started
    started.kill()
    started.wait()
    started.stderr.close()


def test_the_verb_answers_as_vl2_run_and_ends_in_order_on_sigterm(process, shared_bundle: Path, tmp_path: Path) -> None:
    url, started = process
    headers = {"Authorization": f"Bearer {'t' * 20}"}
    (tmp_path / "image.png").write_bytes(png())
    body = {"messages": [user("What is shown?", data_url(png()))], "max_tokens": 9}
    served = httpx.post(url + CHAT, json=body, headers=headers, timeout=60).json()
    run = subprocess.run([*RUN, "run", shared_bundle, "--prompt", "What is shown?", "--image", tmp_path / "image.png",
                          "--max-new-tokens", "9"], capture_output=True, text=True, check=True)
    assert served["choices"][0]["message"]["content"] + "\n" == run.stdout
    answered = []
    long = {"messages": [user("x")], "max_tokens": 200}
    asking = threading.Thread(target=lambda: answered.append(
        httpx.post(url + CHAT, json=long, headers=headers, timeout=PATIENCE)))
    asking.start()
    wait_until(lambda: service_is_busy(url) or answered)
    started.send_signal(signal.SIGTERM)
    assert started.wait(PATIENCE) == 0
    asking.join(PATIENCE)
    assert answered[0].status_code == 200


@pytest.mark.parametrize("options, reason", [
    (["--host", "0.0.0.0"], "no token guards the model"), (["--token-file", "/nowhere"], "cannot be read"),
    (["--image-root", "/nowhere"], "is no folder"), (["--allow-remote-images", "*"], "no host to fetch images from"),
])
def test_the_verb_refuses_before_it_opens_the_bundle(options: list[str], reason: str, capsys, monkeypatch) -> None:
    from vl2.cli import cli, run_command

    monkeypatch.delenv("VL2_SERVE_TOKEN", raising=False)
    assert run_command(cli, "vl2", ["serve", "no.bundle", "--port", "0", *options]) == 1
    assert reason in capsys.readouterr().err


def test_the_verb_names_the_extra_when_a_package_is_missing(capsys, monkeypatch) -> None:
    from vl2.cli import cli, run_command

    for name in [name for name in sys.modules if name.startswith("vl2.runtime.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run_command(cli, "vl2", ["serve", "no.bundle"]) == 1
    assert "'.[serve]'" in capsys.readouterr().err

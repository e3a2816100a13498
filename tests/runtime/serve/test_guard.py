"""Hosts, tokens, headers and errors, for every path."""

import logging

import pytest

from tests.runtime.serve.conftest import CHAT, question
from vl2.errors import VL2Error
from vl2.runtime.serve.server import listen
from vl2.runtime.serve.settings import ServeSettings
from vl2.runtime.serve.tokens import VARIABLE, read_tokens

TOKENS = ("a" * 20, "b" * 20)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_with_tokens_everything_asks_for_one_but_page_health_and_description(served) -> None:
    client = served(tokens=TOKENS)
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/unknown"),
                         ("GET", "//v1/models"), ("GET", "/v1/models/small"), ("PUT", "/v1/models")):
        refused = client.request(method, path)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer", path
        assert refused.json()["error"]["code"] == "invalid_api_key"
    for path in ("/health", "/openapi.json"):
        assert client.request("GET", path).status_code == 200


@pytest.mark.parametrize("header", [
    "Bearer", "Bearer ", f"Bearer {'a' * 19}", f"Bearer {'a' * 21}", f"Basic {'a' * 20}", "a" * 20, "Bearer \xff\xfe",
])
def test_wrong_tokens_are_refused(served, header: str) -> None:
    client = served(tokens=TOKENS)
    assert client.request("GET", "/v1/models", headers={"Authorization": header.encode("latin-1")}).status_code == 401


def test_each_token_of_the_file_opens(served) -> None:
    client = served(tokens=TOKENS)
    for token in TOKENS:
        assert client.ask(question(), headers=bearer(token)).status_code == 200


@pytest.mark.parametrize("host, admitted", [
    ("localhost", True), ("localhost:8000", True), ("127.0.0.1:8000", True), ("127.0.0.2", True), ("[::1]:8000", True),
    ("[::1]", True), ("LOCALHOST", True), ("evil.org", False), ("evil.org:8000", False), ("localhost.evil.org", False),
    ("127.0.0.1.evil.org", False), ("10.0.0.1", False), ("", False), ("proxy.example", True),
])
def test_without_tokens_only_names_of_this_machine_are_answered(served, host: str, admitted: bool) -> None:
    client = served(host_names=frozenset({"proxy.example"}))
    done = client.request("GET", "/health", headers={"Host": host})
    assert done.status_code == (200 if admitted else 403)
    assert admitted or done.json()["error"]["code"] == "host_not_allowed"


def test_with_tokens_any_host_name_is_answered(served) -> None:
    assert served(tokens=TOKENS).request("GET", "/health", headers={"Host": "jetson.lan"}).status_code == 200


def test_every_answer_carries_the_security_headers_and_a_name(served) -> None:
    client = served()
    for method, path in (("GET", "/health"), ("GET", "/nothing"), ("POST", CHAT)):
        headers = client.request(method, path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/nothing", 404), ("GET", CHAT, 405), ("DELETE", "/health", 405), ("GET", "/..%2f..%2fetc/passwd", 404),
    ("GET", "/../app.py", 404), ("GET", "/page/index.html", 404), ("GET", "/v1/models/other", 404),
    ("OPTIONS", CHAT, 405),
])
def test_paths_and_methods_that_are_not_there_get_an_error_object(served, method: str, path: str, status: int) -> None:
    done = served().request(method, path)
    assert done.status_code == status and set(done.json()["error"]) == {"message", "type", "param", "code"}
    assert status != 405 or done.headers["allow"]


def test_a_defect_shows_the_client_a_name_and_the_log_the_traceback(served, caplog, monkeypatch) -> None:
    client = served()
    monkeypatch.setattr(client.service.worker._model, "complete", lambda *_: 1 / 0)
    with caplog.at_level(logging.ERROR, "vl2.serve"):
        done = client.ask(question())
    error = done.json()["error"]
    assert done.status_code == 500 and error["code"] == done.headers["x-request-id"] and "Zero" not in done.text
    assert error["code"] in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_defect_outside_of_the_model_is_answered_the_same_way(served, monkeypatch) -> None:
    client = served()
    monkeypatch.setattr(client.service.worker, "submit", lambda *_: 1 / 0)
    done = client.ask(question())
    assert done.status_code == 500 and done.json()["error"]["code"] == done.headers["x-request-id"]


def test_a_name_with_a_slash_is_found(served) -> None:
    client = served(name="deepseek/vl2")
    for path in ("/v1/models/deepseek/vl2", "/v1/models/deepseek%2Fvl2"):
        assert client.request("GET", path).json()["id"] == "deepseek/vl2"
    assert client.request("GET", "/v1/models/vl2").json()["error"]["code"] == "model_not_found"


def test_requests_are_counted_by_path_and_status(served) -> None:
    client = served()
    client.ask(question())
    client.ask({})
    client.request("GET", "/some/secret/path")
    text = client.request("GET", "/metrics").text
    for line in (f'vl2_requests_total{{path="{CHAT}",status="200"}} 1.0', f'path="{CHAT}",status="400"}} 1.0',
                 'path="other",status="404"} 1.0', "vl2_answer_tokens_total 6.0", "vl2_queue_length 0.0",
                 "vl2_time_to_first_token_seconds_count 1.0", "process_resident_memory_bytes "):
        assert line in text
    assert "secret" not in text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_beyond_loopback_a_token_is_needed(host: str) -> None:
    with pytest.raises(VL2Error, match="no token guards the model"):
        listen(host or "0.0.0.0", 0, ())
    listen(host or "0.0.0.0", 0, TOKENS).close()


def test_a_taken_port_and_an_unknown_host_are_told() -> None:
    with listen("127.0.0.1", 0, ()) as taken, pytest.raises(VL2Error, match="cannot be listened on"):
        listen("127.0.0.1", taken.getsockname()[1], ())
    with pytest.raises(VL2Error, match="has no address"):
        listen("no host", 0, ())


def test_tokens_come_from_a_private_file_or_the_environment(tmp_path, monkeypatch) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{TOKENS[0]}\n\n  {TOKENS[1]}\n")
    path.chmod(0o644)
    with pytest.raises(VL2Error, match="mode 644"):
        read_tokens(path)
    path.chmod(0o600)
    assert read_tokens(path) == TOKENS and read_tokens(None) == ()
    monkeypatch.setenv(VARIABLE, TOKENS[0])
    with pytest.raises(VL2Error, match="both given"):
        read_tokens(path)
    monkeypatch.setenv(VARIABLE, TOKENS[0])
    assert read_tokens(None) == TOKENS[:1] and read_tokens(None) == ()


@pytest.mark.parametrize("content", ["", "short", "with space in the token", "ümläut-ümläut-ümläut"])
def test_weak_tokens_are_refused_without_being_shown(tmp_path, content: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(VL2Error) as error:
        read_tokens(path)
    assert not content or content not in str(error.value)


@pytest.mark.parametrize("host", ["*", "https://example.org", "example.org/", "a@b", "example.org:443", ""])
def test_hosts_of_images_are_bare_names(host: str) -> None:
    with pytest.raises(VL2Error, match="no host to fetch images from"):
        ServeSettings("small", image_hosts=frozenset({host}))

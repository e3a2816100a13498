"""Several answers at once: each the one it would be alone, whoever comes, goes, fails or does not read beside it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.serve.conftest import CHAT, PATIENCE, GatedSlots, InMemory, data_url, png, question, user
from tests.runtime.small_bundle import SlotsBackend, numpy_model_of, slots_model_of
from vl2.errors import VL2Error
from vl2.runtime import AnswerStream, generate
from vl2.runtime.constrained import Matcher
from vl2.runtime.serve import images

BODIES = [
    question("What is shown?", data_url(png()), max_tokens=20),
    question("Why?", max_tokens=33, temperature=1.3, seed=4, top_p=0.9),
    question("Where is it, and since when?", max_tokens=25, logprobs=True, top_logprobs=3, frequency_penalty=1),
    question("How many?", max_tokens=12, response_format={"type": "json_schema", "json_schema": {
        "name": "n", "strict": True, "schema": {"type": "object", "properties": {"n": {"type": "integer"}},
                                                "required": ["n"], "additionalProperties": False}}}),
    question("And now?", data_url(png((20, 50), "blue")), max_tokens=9, stop=["e", "a"]),
]  # fmt: skip


class Asking(threading.Thread):
    """A request on its way in a thread."""

    def __init__(self, client: InMemory, body: dict[str, Any], **headers: str):
        super().__init__(daemon=True)
        self._ask, self.found = (client, body, headers), None
        self.start()

    def run(self) -> None:
        client, body, headers = self._ask
        self.found = client.ask(body, headers=headers)

    def result(self) -> Any:
        self.join(PATIENCE)
        assert self.found is not None, "no answer came"
        return self.found


def wait_until(holds) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.002)


def gated_slots(bundle: Path) -> tuple[Any, GatedSlots]:
    backend = GatedSlots()
    return slots_model_of(bundle, backend), backend


def beside_the_first(client: InMemory, backend: GatedSlots, body: dict[str, Any]) -> tuple[Asking, Asking]:
    """A long answer that stands after three steps until the request of `body` waits beside it; then both go on."""
    backend.shut_after = 3
    first = Asking(client, question("Why?", max_tokens=300))
    assert backend.reached.wait(PATIENCE)
    second = Asking(client, body)
    wait_until(lambda: client.service.worker.waiting() == 1)
    backend.gate.set()
    return first, second


def after_steps_of_others(backend: GatedSlots, work: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """`work` that first waits for five more decoder runs, and how many there had been at each call."""
    called_at: list[int] = []

    def slow(*given: Any) -> Any:
        called_at.append(len(backend.batches))
        wait_until(lambda: len(backend.batches) >= called_at[-1] + 5)
        return work(*given)

    return slow, called_at


def choice(response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def test_answers_at_once_are_those_of_single_runs(served, shared_bundle: Path) -> None:
    alone = served(model=slots_model_of(shared_bundle), batch=1)
    expected = [choice(alone.ask(body)) for body in BODIES]
    model, backend = gated_slots(shared_bundle)
    client = served(model=model, batch=8)
    for _ in range(3):
        backend.gate.clear()
        asking = [Asking(client, body) for body in BODIES]
        wait_until(lambda: client.service.worker.waiting() + client.service.worker.running() == len(BODIES))
        backend.gate.set()
        assert [choice(each.result()) for each in asking] == expected
    assert max(backend.batches) >= 3 and not model._contexts._busy


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_no_more_run_than_the_batch_and_the_others_wait(served, shared_bundle: Path, batch: int) -> None:
    model, backend = gated_slots(shared_bundle)
    client = served(model=model, batch=batch)
    asking = [Asking(client, question("Why?", max_tokens=60)) for _ in range(5)]
    seen = set()
    while any(each.is_alive() for each in asking):
        seen.add(client.service.worker.running())
    assert max(seen) <= batch and max(backend.batches) == batch
    assert len({choice(each.result())["message"]["content"] for each in asking}) == 1
    assert 'vl2_running 0.0' in client.request("GET", "/metrics").text


def test_a_bundle_without_slots_answers_one_at_a_time(served, shared_bundle: Path) -> None:
    model = numpy_model_of(shared_bundle)
    client = served(model=model, batch=8)
    assert model.largest_batch == client.service.worker._batch == 1
    asking = [Asking(client, question("Why?")) for _ in range(3)]
    assert len({choice(each.result())["message"]["content"] for each in asking}) == 1


def test_a_new_prompt_is_computed_between_the_steps_of_the_others(served, shared_bundle: Path, monkeypatch) -> None:
    model, backend = gated_slots(shared_bundle)
    client = served(model=model, batch=2)
    complete = model.complete

    def in_small_chunks(messages, options):
        return complete(messages, replace(options, prefill_chunk=8))

    monkeypatch.setattr(model, "complete", in_small_chunks)
    backend.shut_after = 3
    first = Asking(client, question("Why?", max_tokens=300))
    assert backend.reached.wait(PATIENCE)
    backend.runs.clear(), backend.batches.clear()
    second = Asking(client, question("word " * 80, max_tokens=20))
    wait_until(lambda: client.service.worker.waiting() == 1)
    backend.gate.set()
    assert choice(second.result()) and choice(first.result())
    sizes = [size for _, size in backend.runs]
    chunks = [index for index, size in enumerate(sizes) if size > 1]
    between = [1 in sizes[start:end] for start, end in zip(chunks, chunks[1:], strict=False)]
    assert len(chunks) >= 5 and any(between), "a decode step stands between two chunks"


def test_images_are_decoded_while_the_others_go_on(served, shared_bundle: Path, monkeypatch) -> None:
    model, backend = gated_slots(shared_bundle)
    client = served(model=model, batch=2)
    alone = choice(client.ask(BODIES[0]))
    slow, called_at = after_steps_of_others(backend, images.decode)
    monkeypatch.setattr(images, "decode", slow)
    first, second = beside_the_first(client, backend, BODIES[0])
    assert choice(second.result()) == alone and called_at
    choice(first.result())


def test_a_constraint_is_read_while_the_others_go_on(served, shared_bundle: Path, monkeypatch) -> None:
    model, backend = gated_slots(shared_bundle)
    client = served(model=model, batch=2)
    alone = choice(client.ask(BODIES[3]))
    slow, called_at = after_steps_of_others(backend, Matcher)
    monkeypatch.setattr(generate, "Matcher", slow)
    first, second = beside_the_first(client, backend, BODIES[3])
    assert choice(second.result()) == alone and called_at
    choice(first.result())


def test_images_are_decoded_once_there_is_memory_for_their_pixels(served, shared_bundle: Path, monkeypatch) -> None:
    model, backend = gated_slots(shared_bundle)
    client = served(model=model, batch=2)
    asked, decoded, decode = [], [], images.decode

    def has_room(streams: list[AnswerStream], more_bytes: int = 0) -> bool:
        asked.append((len(streams), more_bytes))
        return not more_bytes

    def seen(content: bytes):
        decoded.append(client.service.worker.running())
        return decode(content)

    monkeypatch.setattr(model, "has_room", has_room)
    monkeypatch.setattr(images, "decode", seen)
    first, second = beside_the_first(client, backend, BODIES[0])
    assert choice(first.result()) and choice(second.result())
    # 8 bytes a pixel of the 40x30 image, beside one answer; decoded when nothing else ran any more.
    assert set(asked) == {(1, 9600)} and decoded == [1]


@pytest.mark.parametrize("stage", [1, 2])
def test_room_that_cannot_be_told_ends_the_job_that_asked_only(served, shared_bundle: Path, monkeypatch, stage) -> None:
    model, backend = gated_slots(shared_bundle)
    client = served(model=model, batch=2)
    alone, asked = choice(client.ask(question("Why?", max_tokens=300))), []

    def has_room(streams: list[AnswerStream], more_bytes: int = 0) -> bool:
        asked.append(len(streams))
        if len(asked) == stage:
            raise VL2Error("the system gives no address space")
        return True

    monkeypatch.setattr(model, "has_room", has_room)
    first, second = beside_the_first(client, backend, question("What?"))
    assert second.result().status_code == 500 and choice(first.result()) == alone
    assert choice(client.ask(question("Why?", max_tokens=300))) == alone


def test_a_broken_image_ends_its_own_job_only(served, shared_bundle: Path) -> None:
    model, backend = gated_slots(shared_bundle)
    client = served(model=model, batch=2)
    alone = choice(client.ask(question("Why?", max_tokens=300)))
    first, broken = beside_the_first(client, backend, question("What?", data_url(png((300, 200))[:400])))
    assert broken.result().status_code == 400 and "truncated" in broken.result().text
    assert choice(first.result()) == alone


def test_who_leaves_takes_nobody_along(served, shared_bundle: Path) -> None:
    model, backend = gated_slots(shared_bundle)
    expected = choice(served(model=slots_model_of(shared_bundle), batch=1).ask(question("Why?", max_tokens=80)))
    client = served(model=model, batch=3)
    backend.shut_after = 6

    async def ask_and_leave() -> None:
        task = asyncio.ensure_future(client._request("POST", CHAT, {"json": question("Where?", max_tokens=200)}))
        await asyncio.to_thread(backend.reached.wait, PATIENCE)
        task.cancel()
        await asyncio.sleep(0.1)
        backend.gate.set()
        await asyncio.gather(task, return_exceptions=True)

    staying = [Asking(client, question("Why?", max_tokens=80)) for _ in range(2)]
    asyncio.run(ask_and_leave())
    assert [choice(each.result()) for each in staying] == [expected] * 2
    wait_until(lambda: client.service.worker.running() == 0)
    assert not model._contexts._busy
    assert choice(client.ask(question("Why?", max_tokens=80))) == expected


def test_a_run_that_fails_ends_those_in_it_and_the_server_goes_on(served, shared_bundle: Path, monkeypatch) -> None:
    model, backend = gated_slots(shared_bundle)
    client = served(model=model, batch=2)
    backend.shut_after = 5
    asking = [Asking(client, question("Why?", max_tokens=100)) for _ in range(2)]
    assert backend.reached.wait(PATIENCE)
    with monkeypatch.context() as broken:
        broken.setattr(SlotsBackend, "run", lambda *_: 1 / 0)
        backend.gate.set()
        answers = [each.result() for each in asking]
    assert {answer.status_code for answer in answers} == {500} and "ZeroDivision" not in answers[0].text
    assert not model._contexts._busy and choice(client.ask(question("Why?")))


def test_a_job_waits_until_there_is_memory_beside_the_others(served, shared_bundle: Path, monkeypatch) -> None:
    model, backend = gated_slots(shared_bundle)
    asked: list[int] = []

    def has_room(streams: list[AnswerStream], more_bytes: int = 0) -> bool:
        asked.append(len(streams))
        return False

    monkeypatch.setattr(model, "has_room", has_room)
    client = served(model=model, batch=4)
    asking = [Asking(client, question("Why?", max_tokens=30)) for _ in range(3)]
    assert len({choice(each.result())["message"]["content"] for each in asking}) == 1
    assert set(asked) <= {1} and max(backend.batches) == 1


def test_a_prompt_that_cannot_be_answered_disturbs_no_other(served, shared_bundle: Path) -> None:
    model, backend = gated_slots(shared_bundle)
    client = served(model=model, batch=4)
    backend.shut_after = 4
    running = Asking(client, question("Why?", max_tokens=60))
    assert backend.reached.wait(PATIENCE)
    bad = Asking(client, {"messages": [user("word " * 900)]})
    wait_until(lambda: client.service.worker.waiting() == 1)
    backend.gate.set()
    assert bad.result().status_code == 400 and choice(running.result())


def test_the_end_of_the_server_ends_all_that_run_and_wait(served, shared_bundle: Path) -> None:
    model, backend = gated_slots(shared_bundle)
    client = served(model=model, batch=2)
    backend.shut_after = 6
    asking = [Asking(client, question("Why?", max_tokens=200)) for _ in range(4)]
    assert backend.reached.wait(PATIENCE)
    # One may run alone when the gate shuts, on a busy machine.
    wait_until(lambda: client.service.worker.waiting() + client.service.worker.running() == len(asking))
    stopping = threading.Thread(target=client.service.worker.stop, args=(PATIENCE,))
    stopping.start()
    backend.gate.set()
    assert [each.result().status_code for each in asking] == [503] * 4
    stopping.join(PATIENCE)
    assert not model._contexts._busy and not client.service.worker._thread.is_alive()


def test_ending_all_answers_those_that_run_before_their_thread_comes_to_it(served, shared_bundle: Path) -> None:
    model, backend = gated_slots(shared_bundle)
    client = served(model=model, batch=2)
    backend.shut_after = 3
    running = Asking(client, question("Why?", max_tokens=200))
    assert backend.reached.wait(PATIENCE)
    client.service.worker.end_all()
    assert running.result().status_code == 503 and "shutting down" in running.result().text
    backend.gate.set()


def test_settings_refuse_a_batch_of_nobody() -> None:
    from vl2.runtime.serve.settings import ServeSettings

    with pytest.raises(VL2Error, match="the batch is 0 answers"):
        ServeSettings("small", batch=0)

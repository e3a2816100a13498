"""Turns in the queue."""

import threading

import pytest

from tests.runtime.serve.conftest import PATIENCE
from vl2.runtime.serve.fair_queue import FairQueue, QueueClosed, QueueFull


def filled(*entries: tuple[str, str], limit: int = 10, per_client: int = 10) -> FairQueue:
    queue = FairQueue(limit, per_client)
    for client, entry in entries:
        queue.put(client, entry)
    return queue


def test_clients_take_turns_and_each_keeps_its_own_order() -> None:
    queue = filled(("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2"))
    assert [queue.take() for _ in range(6)] == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_new_client_waits_one_round_at_most() -> None:
    queue = filled(("a", "a1"), ("a", "a2"), ("a", "a3"))
    assert queue.take() == "a1"
    queue.put("b", "b1")
    assert [queue.take(), queue.take()] == ["a2", "b1"]


def test_both_bounds_hold_and_say_which_was_reached() -> None:
    queue = filled(("a", "a1"), ("a", "a2"), limit=3, per_client=2)
    with pytest.raises(QueueFull, match="2 of your requests are waiting, at most 2 may"):
        queue.put("a", "a3")
    queue.put("b", "b1")
    with pytest.raises(QueueFull, match="3 requests are waiting, at most 3 may"):
        queue.put("c", "c1")
    assert len(queue) == 3


def test_a_removed_entry_is_never_taken_and_makes_room() -> None:
    queue = filled(("a", "a1"), ("a", "a2"), limit=2)
    assert queue.remove("a", "a1") and not queue.remove("a", "a1") and not queue.remove("b", "a2")
    queue.put("b", "b1")
    assert [queue.take(), queue.take()] == ["a2", "b1"]


def test_closing_frees_who_waits_and_returns_what_is_left() -> None:
    empty, taken = FairQueue(1, 1), []
    waiting = threading.Thread(target=lambda: taken.append(empty.take()))
    waiting.start()
    assert empty.close() == []
    waiting.join(PATIENCE)
    assert taken == [None]
    full = filled(("a", "a1"), ("b", "b1"))
    assert full.close() == ["a1", "b1"] and full.take() is None
    with pytest.raises(QueueClosed):
        full.put("a", "a2")

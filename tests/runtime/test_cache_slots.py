"""Sequences whose caches are rows of shared buffers: steps taken together give what each gives alone."""

import mmap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.small_bundle import HIDDEN, SLOTS_GRAPH, numpy_model_of, slots_model_of
from vl2.errors import VL2Error
from vl2.manifest import Port
from vl2.prompt import Message
from vl2.runtime import GenerationOptions
from vl2.runtime.bundle import check_ports
from vl2.runtime.cache_slots import CacheSlots, SlotCache
from vl2.runtime.engine import Context, Step, run_steps

SHORT = GenerationOptions(max_new_tokens=9, ignore_eos=True)
ASKED = [[Message("user", text)]
         for text in ("Where is it?", "Why is that so, and since when?", "Where is it now?", "How?")]


def filled(model, seed: int) -> Context:
    """A context with some positions, as many as the seed draws."""
    rng, context = np.random.default_rng(seed), Context(model.engine)
    ids = rng.integers(3, 600, rng.integers(1, 90))
    context.prefill(ids, model.engine.embeddings.lookup(ids), 7)
    return context


@settings(max_examples=20)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True), st.integers(1, 5))
def test_steps_taken_together_are_single_steps(shared_bundle: Path, seeds: list[int], rounds: int) -> None:
    model = slots_model_of(shared_bundle)
    together, single = ([filled(model, seed) for seed in seeds] for _ in range(2))
    for number in range(rounds):
        tokens = [3 + (seed * 7 + number) % 600 for seed in seeds]
        logits = run_steps([Step(context, token) for context, token in zip(together, tokens, strict=True)])
        assert model.engine.backend.batches[-1] == len(seeds)
        for context, token, got in zip(single, tokens, logits, strict=True):
            assert np.array_equal(context.decode_step(token), got)
    assert [context._contents for context in together] == [context._contents for context in single]


def test_a_row_is_free_again_with_its_memory_when_its_context_is_gone() -> None:
    slots = CacheSlots(SLOTS_GRAPH, 4096)
    cache, other = SlotCache(slots), SlotCache(slots)
    assert cache.slab is other.slab and cache.slot != other.slot
    slab, slot = cache.slab, cache.slot
    for each in (cache, other):
        each.slab.buffers["key_cache.0"][each.slot] = 5
    del cache, each
    assert slot in slab.free and not slab.buffers["key_cache.0"][slot].any(), "its pages were given back"
    assert (slab.buffers["key_cache.0"][other.slot] == 5).all()
    assert SlotCache(slots).slot == slot


def test_rows_whose_ends_share_a_page_keep_their_neighbours() -> None:
    slots = CacheSlots(SLOTS_GRAPH, 700)
    caches = [SlotCache(slots) for _ in range(3)]
    for number, cache in enumerate(caches):
        for buffer in cache.slab.buffers.values():
            buffer[cache.slot] = number + 1
    del caches[1], cache
    for number, cache in zip((1, 3), caches, strict=True):
        assert all((buffer[cache.slot] == number).all() for buffer in cache.slab.buffers.values())


def test_more_sequences_than_a_slab_holds_lie_in_another_and_still_step_together(shared_bundle: Path) -> None:
    model = slots_model_of(shared_bundle)
    contexts = [filled(model, 1) for _ in range(34)]
    last = contexts[30:34]
    assert len({id(context._cache.slab) for context in last}) == 2
    logits = run_steps([Step(context, 5) for context in last])
    assert model.engine.backend.batches[-2:] == [2, 2] and all(np.array_equal(each, logits[0]) for each in logits)


def test_address_space_that_is_refused_is_asked_for_in_smaller_parts(monkeypatch) -> None:
    whole = mmap.mmap

    def stingy(descriptor: int, size: int, **flags):
        if size > 5 * 700 * HIDDEN * 4:
            raise OSError("cannot allocate memory")
        return whole(descriptor, size, **flags)

    monkeypatch.setattr("vl2.runtime.cache_slots.mmap.mmap", stingy)
    cache = SlotCache(CacheSlots(SLOTS_GRAPH, 700))
    assert len(cache.slab.free) + 1 == 4
    with pytest.raises(VL2Error, match="no address space") as error:
        SlotCache(CacheSlots(SLOTS_GRAPH, 1 << 50))
    assert error.value.hint


def test_a_kernel_without_huge_pages_gives_slots_all_the_same(monkeypatch) -> None:
    monkeypatch.setattr(mmap, "MADV_NOHUGEPAGE", 999)
    with pytest.raises(OSError), mmap.mmap(-1, mmap.PAGESIZE) as mapped:
        mapped.madvise(mmap.MADV_NOHUGEPAGE)
    slab, slot = CacheSlots(SLOTS_GRAPH, 64).take()
    assert slab.capacity == 64 and slot not in slab.free and len(slab.free) > 1


def test_positions_beyond_the_model_are_refused(shared_bundle: Path) -> None:
    with pytest.raises(VL2Error, match="701 positions were asked for, and the model holds 700"):
        SlotCache(CacheSlots(SLOTS_GRAPH, 700)).reserve(701)


def test_answers_in_turns_and_together_are_those_of_a_decoder_without_slots(shared_bundle: Path) -> None:
    expected = [numpy_model_of(shared_bundle).complete(messages, SHORT).read() for messages in ASKED]
    model = slots_model_of(shared_bundle)
    streams = [model.complete(messages, SHORT) for messages in ASKED]
    waiting = {stream: next_step(stream) for stream in streams}
    assert model._contexts._busy and model.largest_batch > 1
    while waiting:
        logits = run_steps(list(waiting.values()))
        waiting = {stream: next_step(stream, row) for stream, row in zip(waiting, logits, strict=True)}
        waiting = {stream: step for stream, step in waiting.items() if step is not None}
    assert [stream.answer.token_ids for stream in streams] == [answer.token_ids for answer in expected]
    assert max(model.engine.backend.batches) == len(ASKED) and not model._contexts._busy
    again = model.complete(ASKED[1], SHORT).read()
    assert again.reused_tokens > 5 and again.token_ids == expected[1].token_ids


def next_step(stream, given=None) -> Step | None:
    """The next step of an answer, None at its end."""
    try:
        while isinstance(found := stream.resume(given), str):
            given = None
        return found
    except StopIteration:
        return None


def test_a_step_that_fails_ends_its_answer_and_hands_the_context_back(shared_bundle: Path) -> None:
    model = slots_model_of(shared_bundle)
    stream = model.complete(ASKED[0], SHORT)
    assert isinstance(next_step(stream), Step)
    with pytest.raises(ZeroDivisionError):
        stream.resume(ZeroDivisionError())
    assert not model._contexts._busy


def test_room_counts_what_running_answers_will_take_and_what_idle_ones_would_give(shared_bundle: Path, monkeypatch):
    model, position = slots_model_of(shared_bundle), (HIDDEN + 1) * 4
    first, second = (model.complete(messages, SHORT) for messages in ASKED[:2])
    next_step(first)
    free = (first.positions + second.positions) * position - model._contexts.used_bytes
    for bytes_free, room in ((free, True), (free - 1, False)):
        monkeypatch.setattr("vl2.memory.available_bytes", lambda bytes_free=bytes_free: bytes_free)
        assert model.has_room([first, second]) is room
        assert model.has_room([first, second], 100) is False
    monkeypatch.setattr("vl2.memory.available_bytes", lambda: free + 100)
    assert model.has_room([first, second], 100) and not model.has_room([first, second], 101)
    first.read()
    assert model.has_room([second])


def test_asking_for_room_takes_no_row(shared_bundle: Path, monkeypatch) -> None:
    model = slots_model_of(shared_bundle)
    stream = model.complete(ASKED[0], SHORT)
    monkeypatch.setattr(CacheSlots, "take", lambda _: 1 / 0)
    assert model.has_room([stream])


def test_both_forms_of_decoders_that_write_their_caches_are_known(shared_bundle: Path) -> None:
    manifest = slots_model_of(shared_bundle).manifest
    check_ports(manifest)
    single = tuple(replace(port, shape=()) if port.name == "past_length" else port for port in SLOTS_GRAPH.inputs
                   if port.name != "cache_row")
    old = replace(manifest, graphs={**manifest.graphs, "decoder": replace(SLOTS_GRAPH, inputs=single)})
    check_ports(old)
    mixed = (*single, Port("cache_row", "int64", ("batch",)))
    with pytest.raises(VL2Error, match="past_length is int64"):
        check_ports(replace(old, graphs={**manifest.graphs, "decoder": replace(SLOTS_GRAPH, inputs=mixed)}))

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl2.manifest import CachePorts, Graph, Port
from vl2.runtime.kv_cache import KVCache

GRAPH = Graph(
    "decoder.onnx", "decoder.data",
    (Port("past_key.0", "float32", ("batch", "past", 2, 3)), Port("past_latent.1", "float16", ("batch", "past", 5))),
    (Port("new_key.0", "float32", ("batch", "new", 2, 3)), Port("new_latent.1", "float16", ("batch", "new", 5))),
    (CachePorts("past_key.0", "new_key.0"), CachePorts("past_latent.1", "new_latent.1")))
STEPS = st.lists(st.one_of(st.integers(1, 90), st.floats(0, 1)), max_size=12)


def extend(cache: KVCache, tokens: int, value: int) -> None:
    cache.reserve(cache.length + tokens)
    for view in cache.room(tokens).values():
        view[:] = np.arange(value, value + tokens).reshape(1, tokens, *[1] * (view.ndim - 2))
    cache.append(tokens)


@given(STEPS)
def test_growing_and_cutting_keep_what_was_written(steps: list) -> None:
    cache, expected = KVCache(GRAPH), np.zeros(0)
    for number, step in enumerate(steps):
        if isinstance(step, float):
            kept = int(step * cache.length)
            cache.truncate(kept)
            expected = expected[:kept]
        else:
            extend(cache, step, 1000 * number % 1024)
            expected = np.append(expected, np.arange(1000 * number % 1024, 1000 * number % 1024 + step))
        past = cache.past()
        assert cache.length == len(expected)
        np.testing.assert_array_equal(past["past_key.0"], np.broadcast_to(expected[None, :, None, None],
                                                                          (1, len(expected), 2, 3)))
        np.testing.assert_array_equal(past["past_latent.1"][0, :, 4], expected)


def test_views_are_contiguous_prefixes_of_one_buffer_and_never_copies() -> None:
    cache = KVCache(GRAPH)
    extend(cache, 10, 0)
    past, room = cache.past()["past_key.0"], cache.room(1)["new_key.0"]
    assert past.flags.c_contiguous and room.flags.c_contiguous
    assert past.dtype == np.float32 and cache.past()["past_latent.1"].dtype == np.float16
    assert room.ctypes.data == past.ctypes.data + past.nbytes
    assert not np.shares_memory(past, room)


def test_the_capacity_at_least_doubles_so_that_growing_stays_cheap() -> None:
    cache, capacities = KVCache(GRAPH), set()
    for _ in range(1000):
        extend(cache, 1, 0)
        capacities.add(cache.capacity)
    assert sorted(capacities) == [64, 128, 256, 512, 1024]
    assert cache.size_bytes == 1024 * (6 * 4 + 5 * 2)


def test_an_empty_cache_gives_empty_views() -> None:
    assert KVCache(GRAPH).past()["past_key.0"].shape == (1, 0, 2, 3)


def test_a_cache_cannot_be_cut_beyond_its_end() -> None:
    with pytest.raises(AssertionError):
        KVCache(GRAPH).truncate(1)


@given(st.integers(0, 90), st.integers(0, 90), st.integers(0, 40))
def test_a_copied_prefix_is_its_own_and_takes_the_place_of_what_was_there(length: int, held: int, more: int) -> None:
    source, copy = KVCache(GRAPH), KVCache(GRAPH)
    extend(source, 90, 0)
    extend(copy, held, 500)
    copy.copy_prefix(source, length)
    extend(copy, more, 200)
    expected = [*range(length), *range(200, 200 + more)]
    source.past()["past_key.0"][:] = -1
    np.testing.assert_array_equal(copy.past()["past_key.0"][0, :, 1, 2], expected)
    np.testing.assert_array_equal(copy.past()["past_latent.1"][0, :, 4], expected)
    assert copy.used_bytes == max(held, length + more) * copy.position_bytes or copy.capacity >= 128
    assert copy.position_bytes * copy.capacity == copy.size_bytes

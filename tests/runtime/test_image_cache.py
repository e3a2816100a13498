"""A second question about an image does not run the vision graph, counted in runs of the backend."""

import hashlib
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runtime.small_bundle import NumpyBackend, numpy_model_of
from vl2 import prompt
from vl2.prompt import Message
from vl2.runtime import BundleOptions, GenerationOptions, Model, open_bundle, prompt_embeds
from vl2.runtime.embeddings import Embeddings
from vl2.runtime.engine import Engine
from vl2.runtime.image_cache import ImageCache
from vl2.runtime.image_store import ImageStore
from vl2.runtime.prompt_embeds import ImageSpan

NOISE = [Image.effect_noise(size, 90) for size in ((60, 40), (33, 70), (20, 20))]
SHORT = GenerationOptions(max_new_tokens=6, ignore_eos=True)


def model_with(bundle: Path, cache: ImageCache) -> Model:
    engine = numpy_model_of(bundle).engine
    return Model(Engine(engine.manifest, engine.processor, Embeddings(bundle, engine.manifest), NumpyBackend(), cache))


def vision_runs(model: Model) -> int:
    return sum(graph == "vision" for graph, _ in model.engine.backend.runs)


def test_another_prompt_before_the_same_image_runs_no_vision_and_answers_as_a_fresh_model(shared_bundle: Path) -> None:
    model = numpy_model_of(shared_bundle)
    assert model.ask("What is shown?", NOISE[:1], SHORT).image_cache_hits == 0
    before = vision_runs(model)
    again = model.ask("Read this: <image> and tell me why.", NOISE[:1], SHORT)
    assert (vision_runs(model), again.image_cache_hits, again.reused_tokens) == (before, 1, 0)
    fresh = numpy_model_of(shared_bundle).ask("Read this: <image> and tell me why.", NOISE[:1], SHORT)
    assert again.token_ids == fresh.token_ids


def test_only_the_new_image_of_two_is_encoded(shared_bundle: Path) -> None:
    model = numpy_model_of(shared_bundle)
    model.ask("What is shown?", NOISE[:1], SHORT)
    model.engine.backend.runs.clear()
    answer = model.ask("Compare them.", [NOISE[2], NOISE[0]], SHORT)
    assert answer.image_cache_hits == 1 and [size for graph, size in model.engine.backend.runs if graph == "vision"]
    assert answer.token_ids == numpy_model_of(shared_bundle).ask("Compare them.", [NOISE[2], NOISE[0]], SHORT).token_ids


def test_the_same_image_twice_in_a_question_is_encoded_once(shared_bundle: Path) -> None:
    model = numpy_model_of(shared_bundle)
    assert model.ask("Compare them.", [NOISE[0], NOISE[0].copy()], SHORT).image_cache_hits == 1
    assert vision_runs(model) == 1


def test_pixels_are_let_go_once_the_images_are_encoded(shared_bundle: Path, monkeypatch) -> None:
    """One image of 50 million pixels is 200 MB, for an answer of minutes."""
    made, load = [], prompt.load_image
    monkeypatch.setattr(prompt, "load_image", lambda source: made.append(weakref.ref(found := load(source))) or found)
    stream = numpy_model_of(shared_bundle).complete([Message("user", "<image>\n<image>\nWhat?", NOISE[:2])], SHORT)
    assert len(made) == 2 and all(image() is not None for image in made)
    next(stream)
    assert [image() for image in made] == [None, None]
    answer = stream.read()
    assert answer.image_size == NOISE[1].size and len(answer.token_ids) == 6


def test_an_image_is_hashed_in_strips_as_a_whole(shared_bundle: Path, monkeypatch) -> None:
    image, crop = NOISE[1].convert("RGB"), np.array([1, 2])
    whole = ImageSpan(image, crop, 0, 9).digest
    facts = np.array([*image.size, 1, 2], np.int64).tobytes()
    assert whole == hashlib.sha256(facts + image.tobytes()).digest()
    for pixels in (1, 33, 100, 33 * 70, 10 ** 6):
        monkeypatch.setattr(prompt_embeds, "_STRIP_PIXELS", pixels)
        assert ImageSpan(image, crop, 0, 9).digest == whole


def test_others_have_a_turn_before_each_image_is_cut(shared_bundle: Path, monkeypatch) -> None:
    happened, cut = [], prompt_embeds.image_tiles
    monkeypatch.setattr(prompt_embeds, "image_tiles", lambda *given: happened.append("cut") or cut(*given))
    stream = numpy_model_of(shared_bundle).complete([Message("user", "<image>\n<image>\nWhat?", NOISE[:2])], SHORT)
    stream.pause_with(lambda: happened.append("turn"))
    next(stream)
    starts = [place for place, name in enumerate(happened) if name == "cut"]
    assert len(starts) == 2 and all(place and happened[place - 1] == "turn" for place in starts)


def test_other_pixels_or_another_cut_are_other_images(shared_bundle: Path) -> None:
    model = numpy_model_of(shared_bundle)
    changed = NOISE[0].copy()
    changed.putpixel((0, 0), 255 - changed.getpixel((0, 0)))
    model.ask("What is shown?", NOISE[:1], SHORT)
    assert model.ask("What is shown?", [changed], SHORT).image_cache_hits == 0
    # Three images switch tiling off, so that the first is cut otherwise.
    assert model.ask("What is shown?", NOISE, SHORT).image_cache_hits == 0


def test_an_image_in_the_kv_cache_counts_as_found(shared_bundle: Path) -> None:
    chat = numpy_model_of(shared_bundle).chat()
    assert chat.ask("What is shown?", NOISE[:1], SHORT).image_cache_hits == 0
    assert chat.ask("Why?", options=SHORT).image_cache_hits == 1


def test_memory_is_bounded_and_the_image_used_longest_ago_goes_first() -> None:
    cache, rows = ImageCache(3 * 64), {name: np.full((4, 4), index, np.float32) for index, name in enumerate("abcd")}
    for name in "abc":
        cache.put(name.encode(), rows[name])
    assert cache.get(b"a") is not None
    cache.put(b"d", rows["d"])
    assert [cache.get(name.encode()) is not None for name in "abcd"] == [True, False, True, True]
    assert cache.size_bytes == 3 * 64
    cache.put(b"e", np.zeros((4, 13), np.float32))
    assert cache.get(b"e") is None and cache.get(b"a") is not None


def test_a_cache_of_no_bytes_holds_nothing(shared_bundle: Path) -> None:
    model = model_with(shared_bundle, ImageCache(0))
    assert [model.ask("What?", NOISE[:1], SHORT).image_cache_hits for _ in range(2)] == [0, 0]


def test_the_next_process_finds_the_image_on_disk_and_does_not_load_the_vision_graph(bundle: Path, tmp_path) -> None:
    options = BundleOptions(cache_dir=tmp_path / "kept", device="cpu")
    question = ("What is shown?", NOISE[:1], SHORT)
    first = open_bundle(bundle, options).ask(*question)
    model = open_bundle(bundle, options)
    second = model.ask(*question)
    assert (first.image_cache_hits, second.image_cache_hits) == (0, 1)
    assert second.token_ids == first.token_ids and list(model.engine.backend._sessions) == ["decoder"]


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-1]),
                                    lambda path: path.write_bytes(bytes(path.stat().st_size))])
def test_a_damaged_entry_is_computed_anew(shared_bundle: Path, tmp_path: Path, damage) -> None:
    def ask():
        model = model_with(shared_bundle, ImageCache(1 << 20, ImageStore(tmp_path, 1 << 20)))
        return model.ask("What is shown?", NOISE[:1], SHORT)

    first = ask()
    damage(next((tmp_path / "images").iterdir()))
    second, third = ask(), ask()
    assert first.token_ids == second.token_ids == third.token_ids
    assert [answer.image_cache_hits for answer in (first, second, third)] == [0, 0, 1]


def test_the_key_depends_on_the_bundle_and_where_it_runs(shared_bundle: Path) -> None:
    engine = numpy_model_of(shared_bundle).engine
    facts = {**engine.manifest.files}
    name = next(iter(facts))
    facts[name] = type(facts[name])(facts[name].size_bytes, "0" * 64)
    other = replace(engine, manifest=replace(engine.manifest, files=facts))
    elsewhere = replace(engine, backend=type("Elsewhere", (), {"description": "CUDA"})())
    assert len({engine.identity, other.identity, elsewhere.identity}) == 3

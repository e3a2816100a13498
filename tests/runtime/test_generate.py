"""Answers of the small bundle on the NumPy backend, against a loop that computes the whole prompt for every token."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.runtime.small_bundle import LIMIT, NumpyBackend, numpy_model_of
from vl2.errors import VL2Error
from vl2.prompt import Message
from vl2.runtime import GenerationOptions, Model
from vl2.runtime.prompt_embeds import embed

NOISE = [Image.effect_noise(size, 90) for size in ((60, 40), (33, 70), (20, 20))]
FREE = GenerationOptions(max_new_tokens=12, ignore_eos=True)


def slow_ids(model: Model, question: str, images: list, count: int) -> list[int]:
    """Greedy ids where each token starts from nothing: no cache, no chunks."""
    engine = model.engine
    content = "<image>\n" * len(images) + question
    layout = engine.processor.lay_out([Message("user", content, images), Message("assistant", "")])
    embeds, ids, backend = embed(engine, layout, 0), [], NumpyBackend()
    for _ in range(count):
        total = len(embeds)
        results = {"logits": np.empty((1, 640), np.float32), "new_key.0": np.empty((1, total, 1, 16), np.float32),
                   "new_value.0": np.empty((1, total, 1, 1), np.float32)}
        backend.run("decoder", {
            "inputs_embeds": embeds[None], "position_ids": np.arange(total)[None],
            "attention_mask": np.ones((1, total), bool), "past_key.0": np.empty((1, 0, 1, 16), np.float32),
            "past_value.0": np.empty((1, 0, 1, 1), np.float32)}, results)
        ids.append(int(results["logits"].argmax()))
        embeds = np.concatenate([embeds, engine.embeddings.lookup(np.array(ids[-1:]))])
    return ids


@pytest.mark.parametrize("images", [[], NOISE[:1], NOISE[:2], NOISE])
def test_answers_equal_the_loop_without_cache(numpy_model: Model, images: list) -> None:
    answer = numpy_model.ask("What is shown?", images, FREE)
    assert list(answer.token_ids) == slow_ids(numpy_model, "What is shown?", images, 12)


@settings(max_examples=15)
@given(st.integers(1, 400))
def test_every_prefill_chunk_gives_the_same_answer(shared_bundle: Path, chunk: int) -> None:
    model = numpy_model_of(shared_bundle)
    whole = model.ask("What is shown?", NOISE[:1], GenerationOptions(12, ignore_eos=True, prefill_chunk=10_000))
    model.engine.backend.runs.clear()
    parts = model.ask("What is shown?", NOISE[:1], GenerationOptions(12, ignore_eos=True, prefill_chunk=chunk))
    assert parts.token_ids == whole.token_ids
    prefills = [size for graph, size in model.engine.backend.runs if graph == "decoder"][:-11]
    assert sum(prefills) == parts.prompt_tokens and max(prefills) <= chunk


def test_the_answer_tells_what_was_done(numpy_model: Model) -> None:
    answer = numpy_model.ask("What is shown?", NOISE[:2], FREE)
    assert answer.stop_reason == "length" and len(answer.token_ids) == 12
    assert answer.image_size == (33, 70) and answer.reused_tokens == 0
    assert answer.prompt_tokens == sum(size for graph, size in numpy_model.engine.backend.runs
                                       if graph == "decoder") - 11
    assert min(answer.encode_ms, answer.prefill_ms, answer.decode_ms) > 0
    assert answer.tokens_per_second == pytest.approx(11 / answer.decode_ms * 1e3)
    assert answer.peak_rss_bytes > 1 << 20
    assert set(answer.to_dict()) >= {"text", "token_ids", "prompt_tokens", "boxes", "stop_reason", "encode_ms",
                                     "prefill_ms", "decode_ms", "tokens_per_second", "peak_rss_bytes"}


def test_one_token_has_no_decoding_speed(numpy_model: Model) -> None:
    answer = numpy_model.ask("hello", options=GenerationOptions(max_new_tokens=1, ignore_eos=True))
    assert (answer.tokens_per_second, answer.decode_ms, len(answer.token_ids)) == (None, 0.0, 1)


def test_pieces_join_to_the_text_and_the_answer_comes_last(numpy_model: Model) -> None:
    stream = numpy_model.stream("What is shown?", NOISE[:1], FREE)
    with pytest.raises(VL2Error, match="not finished"):
        _ = stream.answer
    pieces = list(stream)
    assert "".join(pieces) == stream.answer.text and all(pieces)
    assert list(stream) == [] and stream.answer.text
    assert stream.answer.token_ids == numpy_model.ask("What is shown?", NOISE[:1], FREE).token_ids


def scripted(model: Model, monkeypatch, text: str) -> list[int]:
    """Makes the model say `text` and then the end token; returns the ids of the text."""
    tokenizer, eos = model.engine.processor.tokenizer, model.engine.processor.eos_id
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    script = iter([*ids, eos, *[5] * 100])
    monkeypatch.setattr("vl2.runtime.sampling.Sampler.draw", lambda self, logits, allowed=None: next(script))
    return ids


def test_the_end_token_ends_the_answer_and_is_not_part_of_it(numpy_model: Model, monkeypatch) -> None:
    ids = scripted(numpy_model, monkeypatch, "Two boats 🙂.")
    answer = numpy_model.ask("How many?")
    assert (answer.text, answer.stop_reason, list(answer.token_ids)) == ("Two boats 🙂.", "eos", ids)


def test_ignoring_the_end_token_goes_on_to_the_length(numpy_model: Model, monkeypatch) -> None:
    ids = scripted(numpy_model, monkeypatch, "Two.")
    answer = numpy_model.ask("How many?", options=GenerationOptions(max_new_tokens=len(ids) + 3, ignore_eos=True))
    assert answer.stop_reason == "length" and list(answer.token_ids) == [*ids, 1, 5, 5]
    assert answer.text.startswith("Two.") and "end" not in answer.text


@pytest.mark.parametrize("stop, text", [("boats", "Two "), ("o b", "Tw"), ("Two", ""), ("near", "Two boats near"),
                                        (" near the river.", "Two boats")])
def test_a_stop_string_ends_the_answer_and_never_shows(numpy_model: Model, monkeypatch, stop: str, text: str) -> None:
    said = "Two boats near the river." if stop != "near" else "Two boats near"
    scripted(numpy_model, monkeypatch, said)
    expected = said[:said.index(stop)]
    stream = numpy_model.stream("How many?", options=GenerationOptions(stop=(stop, "never said")))
    shown = ""
    for piece in stream:
        shown += piece
        assert expected.startswith(shown)
    assert (shown, stream.answer.text, stream.answer.stop_reason) == (expected, expected, "stop")


def test_text_that_only_began_like_a_stop_string_is_shown_in_the_end(numpy_model: Model, monkeypatch) -> None:
    scripted(numpy_model, monkeypatch, "one EN")
    answer = numpy_model.ask("Say it", options=GenerationOptions(stop=("END",)))
    assert (answer.text, answer.stop_reason) == ("one EN", "eos")


def test_boxes_come_in_pixels_of_the_last_image(numpy_model: Model, monkeypatch) -> None:
    scripted(numpy_model, monkeypatch, "<|ref|>cup<|/ref|><|det|>[[0, 0, 999, 500]]<|/det|> <|ref|>x<|/ref|>")
    answer = numpy_model.ask("<|grounding|>Find the cup.", NOISE[:1])
    assert answer.to_dict()["boxes"] == [{"label": "cup", "box": [0, 0, 999, 500], "pixels": [0, 0, 60, 20]}]
    assert answer.box_problems == ("label 'x' has no boxes",)


def test_images_come_first_unless_the_question_places_them(numpy_model: Model) -> None:
    first = numpy_model.ask("What is shown?", NOISE[:2], FREE)
    same = numpy_model.ask("<image>\n<image>\nWhat is shown?", NOISE[:2], FREE)
    other = numpy_model.ask("<image>\nand <image>: what is shown?", NOISE[:2], FREE)
    assert first.token_ids == same.token_ids and first.prompt_tokens != other.prompt_tokens


@pytest.mark.parametrize("question, images, message", [
    ("", [], "the question is ''"), ("  \n", NOISE[:1], "expected some text"),
    ("<image>", NOISE[:1], "expected some text"),
    ("<image> what?", [], "has 1 <image> and 0 images"), ("<image> what?", NOISE[:2], "has 1 <image> and 2 images"),
    ("what?", ["none.png"], "none.png: no such image file"),
    ("what?", "none.png", "images is one str, expected a list"),
    ("what?", [Image.new("RGB", (1, 900))], "too thin"),
])
def test_a_bad_question_is_refused_before_any_graph_runs(numpy_model: Model, question, images, message: str) -> None:
    with pytest.raises(VL2Error, match=message) as error:
        numpy_model.ask(question, images)
    assert error.value.hint
    assert numpy_model.engine.backend.runs == []


def test_a_prompt_too_long_is_refused_with_its_numbers(numpy_model: Model) -> None:
    with pytest.raises(VL2Error, match=r"the prompt has [\d,]+ tokens, 93 of them for 1 images; .* holds 700") as error:
        numpy_model.stream("word " * LIMIT, NOISE[:1])
    assert error.value.hint and numpy_model.engine.backend.runs == []


def test_an_answer_ends_where_the_models_positions_end(numpy_model: Model) -> None:
    answer = numpy_model.ask("hello " * 200, options=GenerationOptions(max_new_tokens=5000, ignore_eos=True))
    assert answer.stop_reason == "length"
    assert answer.prompt_tokens + len(answer.token_ids) == LIMIT

"""Exported miniature checkpoints in the runtime against the recorded outputs of the original implementation."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from vl2.runtime import Answer, GenerationOptions, Model, open_bundle

CASES = ("text", "one", "tiled", "two")
COUNT = 24


@dataclass(frozen=True)
class Exported:
    """An opened fp32 bundle of a miniature checkpoint, and what the original computed with the same weights."""

    model: Model
    facts: dict
    generation: dict[str, np.ndarray]
    recorded: dict[str, np.ndarray]
    images: Path

    def ask(self, case: str, **options) -> Answer:
        facts = self.facts[case]
        images = [self.images / f"{name}.png" for name in facts["images"]]
        options = GenerationOptions(max_new_tokens=COUNT, ignore_eos=True, **options)
        return self.model.ask(facts["conversation"][0]["content"], images, options)


@pytest.fixture(scope="module")
def exported(mini_folder: Path, bundle_of) -> Exported:
    golden = mini_folder / "golden"
    arrays = [dict(np.load(golden / name)) for name in ("generation.npz", "model.npz")]
    facts = json.loads((golden / "model.json").read_text())["cases"]
    return Exported(open_bundle(bundle_of(mini_folder)), facts, *arrays, mini_folder.parent / "images")


@pytest.mark.parametrize("case", CASES[:3])
def test_greedy_tokens_and_text_equal_the_originals(exported: Exported, case: str) -> None:
    answer = exported.ask(case)
    assert answer.token_ids == tuple(exported.generation[f"{case}/ids"][0])
    assert answer.text == exported.facts[case]["generated_text"]
    assert answer.prompt_tokens == exported.facts[case]["seq_len"]


def test_two_images_begin_with_the_originals_token_and_go_on_as_without_chunks(exported: Exported) -> None:
    answer = exported.ask("two")
    assert answer.token_ids[0] == exported.recorded["two/logits_argmax"][0, -1]
    assert answer.token_ids == exported.ask("two", prefill_chunk=10_000).token_ids


@pytest.mark.parametrize("case", CASES[:3])
def test_the_repetition_penalty_counts_prompt_tokens_as_the_originals(exported: Exported, case: str) -> None:
    answer = exported.ask(case, repetition_penalty=1.1)
    assert answer.token_ids == tuple(exported.generation[f"{case}/reppen_with_prompt_ids"].reshape(-1))


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_a_prefill_in_chunks_gives_the_originals_tokens(exported: Exported, chunk: int) -> None:
    case = "text" if chunk == 1 else "one"
    assert exported.ask(case, prefill_chunk=chunk).token_ids == tuple(exported.generation[f"{case}/ids"][0])


def test_a_conversation_with_cache_answers_as_one_from_nothing(exported: Exported) -> None:
    options = GenerationOptions(max_new_tokens=6, ignore_eos=True)
    image = exported.images / "sq_384x384.png"
    chat = exported.model.chat()
    chat.ask("What is shown?", [image], options)
    chat.ask("And why?", options=options)
    third = chat.ask("Are you sure?", options=options)
    fresh = exported.model.chat()
    fresh.history = chat.history[:-2]
    assert third.reused_tokens > 421 and third.token_ids == fresh.ask("Are you sure?", options=options).token_ids


def test_a_float16_bundle_of_bfloat16_weights_gives_the_originals_tokens(goldens: Path, bundle_of) -> None:
    folder = goldens / "tiny-mini"
    facts = json.loads((folder / "golden" / "model.json").read_text())["cases"]["one"]
    model = open_bundle(bundle_of(folder, "fp16"))
    answer = model.ask(facts["conversation"][0]["content"], [goldens / "images" / f"{facts['images'][0]}.png"],
                       GenerationOptions(max_new_tokens=COUNT, ignore_eos=True))
    assert answer.text == facts["generated_text"]

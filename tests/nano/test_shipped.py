"""The checkpoint, the held-out set and the demo as they are shipped."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import vl2.nano
from vl2.config import load_config
from vl2.model.checkpoint import check_checkpoint, load_model
from vl2.nano.batches import HELD_OUT_SEED, TRAINING_SEED
from vl2.nano.demo import ANSWER, QUESTION
from vl2.nano.evaluate import ask_checkpoint, evaluate
from vl2.nano.questions import TASKS
from vl2.runtime.grounding import parse

NANO = Path(vl2.nano.__file__).parent
CHECKPOINT, SIBLING, HELD_OUT = NANO / "checkpoint", NANO / "checkpoint-mla", NANO / "heldout"
# (a share of the questions that keeps the test below a minute, accuracy of all tasks); the model cards have all figures
EXPECTED = {CHECKPOINT: (12, 0.6), SIBLING: (36, 0.4)}


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    return [json.loads(line) for line in (HELD_OUT / "heldout.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("checkpoint", EXPECTED, ids=lambda folder: folder.name)
def test_the_checkpoint_accounts_for_every_tensor_and_is_small(checkpoint):
    entries = check_checkpoint(checkpoint, load_config(checkpoint))
    assert sum(entry.size_bytes for entry in entries.values()) <= 12_000_000
    assert {entry.dtype for entry in entries.values()} == {"BF16"}
    load_model(checkpoint)


def test_the_checkpoint_has_tiny_s_structure():
    config = load_config(CHECKPOINT)
    language = config.language_config
    assert not language.use_mla and language.first_k_dense_replace == 1 and language.n_shared_experts == 2
    assert language.topk_method == "greedy" and not language.norm_topk_prob
    assert config.global_view_pos == "head" and len(config.candidate_resolutions) > 1


def test_its_sibling_has_small_s_attention_and_the_same_images():
    ours, other = load_config(CHECKPOINT), load_config(SIBLING)
    assert other.language_config.use_mla and other.language_config.kv_lora_rank == 64
    assert (other.vision_config, other.candidate_resolutions) == (ours.vision_config, ours.candidate_resolutions)


def test_the_held_out_set_asks_over_500_well_formed_questions(lines):
    assert len(lines) >= 500
    assert {line["task"] for line in lines} == set(TASKS.values())
    assert min(Counter(line["task"] for line in lines).values()) >= 20
    for line in lines:
        boxes = [[box.x1, box.y1, box.x2, box.y2] for box in parse(line["answer"]).boxes]
        assert boxes == line["boxes"], line["id"]
        assert line["question"] and line["answer"]


def test_the_held_out_images_exist_and_are_small(lines):
    images = {line["image"] for line in lines}
    assert images == {f"images/{path.name}" for path in (HELD_OUT / "images").iterdir()}
    assert sum((HELD_OUT / name).stat().st_size for name in images) <= 2_500_000
    for name in images:
        with Image.open(HELD_OUT / name) as image:
            assert image.mode == "RGB" and min(image.size) >= 50


def test_held_out_pages_come_from_other_seeds_than_training():
    assert not TRAINING_SEED.startswith(HELD_OUT_SEED) and not HELD_OUT_SEED.startswith(TRAINING_SEED)


@pytest.mark.parametrize("checkpoint", EXPECTED, ids=lambda folder: folder.name)
def test_the_shipped_models_answer_the_held_out_questions(checkpoint):
    every, accuracy = EXPECTED[checkpoint]
    table, wrong = evaluate(checkpoint, HELD_OUT / "heldout.jsonl", every)
    assert table["all"]["accuracy"] >= accuracy, [(line["question"], line["answer"], line["given"]) for line in wrong]


def test_the_demo_question_is_answered_rightly():
    assert ask_checkpoint(CHECKPOINT)(NANO / "demo.png", QUESTION) == ANSWER

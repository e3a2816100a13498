"""A reference, a candidate that differs from it in its head, and questions on three images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runtime import small_bundle
from vl2.accuracy.record import OpenBundle
from vl2.runtime import open_bundle

SIZES = ((60, 40), (33, 70), (20, 20))
QUESTIONS = ({"id": "a", "image": "0.png", "task": "ocr", "question": "What?", "answers": ["x", "y"]},
             {"id": "b", "image": "0.png", "task": "ocr", "question": "And where?", "answer": "x"},
             {"id": "c", "image": "1.png", "task": "boxes", "question": "Locate it.", "boxes": [[1, 2, 30, 40]]},
             {"id": "d", "images": ["1.png", "2.png"], "question": "Compare <image> with <image>.", "metric": "anls",
              "answers": ["no"]},
             {"id": "e", "question": "Two and two?"})


@pytest.fixture(scope="session")
def reference_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle.build_bundle(tmp_path_factory.mktemp("reference") / "reference.bundle")


@pytest.fixture(scope="session")
def candidate_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    noise = np.random.default_rng(3).normal(0, 0.15, small_bundle.W_HEAD.shape).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_bundle, "W_HEAD", small_bundle.W_HEAD + noise)
        return small_bundle.build_bundle(tmp_path_factory.mktemp("candidate") / "candidate.bundle")


@pytest.fixture(scope="session")
def reference(reference_bundle: Path) -> OpenBundle:
    return OpenBundle(reference_bundle, open_bundle(reference_bundle))


@pytest.fixture(scope="session")
def candidate(candidate_bundle: Path) -> OpenBundle:
    return OpenBundle(candidate_bundle, open_bundle(candidate_bundle))


def write_questions(path: Path, *records: object) -> Path:
    path.write_text("".join(r + "\n" if isinstance(r, str) else json.dumps(r) + "\n" for r in records), "utf-8")
    return path


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five questions: two on one image, boxes, two images, text alone."""
    folder = tmp_path_factory.mktemp("questions")
    random = np.random.default_rng(0)
    for index, (width, height) in enumerate(SIZES):
        Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8)).save(folder / f"{index}.png")
    return write_questions(folder / "questions.jsonl", *QUESTIONS)

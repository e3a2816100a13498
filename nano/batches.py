"""Training batches: documents of one crop, encoded by the family's own processor, rendered ahead in other processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full
from random import Random

import numpy as np

from vl2.image import image_token_count
from vl2.nano.documents import Document, make_document
from vl2.nano.geometry import GEOMETRY, write_description
from vl2.nano.labels import tile_labels
from vl2.nano.pointers import NOWHERE, block_positions, character_targets, subject_targets
from vl2.nano.questions import Question
from vl2.prompt import Message, Processor

TRAINING_SEED, HELD_OUT_SEED = "train", "held-out"
MOST_LOCATED = 2  # grounding answers are long; more would crowd out the others
LABELS = ("patches", "slots", "boxes", "places")
IMAGE_START = 4  # bos, <|User|>, ":", " " come before the image block
# Crop → (share of the batches, pages in a batch, text tokens a page may have).
CROP_PLAN = {
    (1, 1): (0.52, 16, 130), (2, 1): (0.14, 10, 150), (1, 2): (0.12, 10, 150), (2, 2): (0.10, 6, 170),
    (3, 1): (0.06, 8, 170), (1, 3): (0.06, 8, 170),
}
# For the tower alone: dense pages of one tile, hardly any text to encode.
TOWER_CROPS = {(1, 1): (0.9, 56, 24), (2, 1): (0.1, 24, 24)}
DENSE_CROPS = {(1, 1): (0.9, 22, 24), (2, 1): (0.1, 10, 24)}
# Kind of document → its share: for the tower alone, in the first part of joint training, afterwards.
TOWER_MIX = {"dense": 60, "lines": 6, "receipt": 6, "form": 6, "table": 8, "chart": 6, "shapes": 8}
EASY_MIX = {"word": 8, "dense": 25, "lines": 27, "receipt": 12, "form": 12, "table": 6, "chart": 4, "shapes": 6}
FULL_MIX = {"word": 7, "dense": 10, "lines": 17, "receipt": 12, "form": 11, "table": 15, "chart": 11, "shapes": 17}


@dataclass(frozen=True)
class Batch:
    """Pages of one crop. n = 1 tile for a 1×1 crop (global view and local tile are the same pixels), else 1 + tw·th.

    tiles: uint8 [B, n, 3, S, S]; before: ids [B, 4] ahead of the image block; text: ids [B, L] behind it, padded right;
    question: int16 [B, L], index into `questions` where the token is to be predicted, −1 elsewhere;
    pointer: int64 [B, L], position in the sequence where that token is to be read, −1 where none is known;
    subject: int64 [B, L], position where the page has what that token of a question speaks of, or −1;
    patches, slots, boxes: labels of the local tiles (see TileLabels), [B, tw·th, …]; places: [B, h·th, h·tw, 4].
    """

    crop: tuple[int, int]
    tiles: np.ndarray
    before: np.ndarray
    text: np.ndarray
    question: np.ndarray
    pointer: np.ndarray
    subject: np.ndarray
    questions: list[Question]
    patches: np.ndarray
    slots: np.ndarray
    boxes: np.ndarray
    places: np.ndarray


def load_processor() -> Processor:
    """The processor of vl2-nano, with prompts masked out of the targets."""
    with tempfile.TemporaryDirectory() as folder:
        write_description(Path(folder))
        return dataclasses.replace(Processor.from_folder(folder), mask_prompt=True)


def choose_questions(rng: Random, document: Document, processor: Processor, room: int) -> list[Question]:
    """Questions of a page that fit into `room` text tokens: often the full text, at most MOST_LOCATED locations."""
    offered = list(document.questions)
    rng.shuffle(offered)
    # Colours are the rarest questions, locations the most frequent and longest.
    offered.sort(key=lambda q: {"colour": -1, "grounding": 1}.get(q.task, 0) * (rng.random() < 0.6))
    if rng.random() < 0.5:
        offered.sort(key=lambda q: not (q.task == "ocr" and "line" not in q.question))
    chosen, located = [], 0
    for question in offered:
        if room < 9:
            break
        length = len(processor.tokenizer.encode(question.question + question.answer).ids) + 7
        if length > room or (question.task == "grounding" and located == MOST_LOCATED):
            continue
        located += question.task == "grounding"
        room -= length
        chosen.append(question)
    rng.shuffle(chosen)
    # Readings last: what stands in an earlier answer would be copied from there, not read off the page.
    return sorted(chosen, key=lambda question: question.task == "ocr")


def _encode(processor: Processor, document: Document, questions: list[Question]):
    messages = []
    for i, question in enumerate(questions):
        first = i == 0
        content = ("<image>\n" if first else "") + question.question
        messages += [Message("user", content, [document.image] if first else ()), Message("assistant", question.answer)]
    return processor.encode(messages, inference=False)


def make_batch(processor: Processor, seed: str, index: int, mix: dict[str, int], crops: dict | None = None) -> Batch:
    """Batch number `index`: the same for the same arguments."""
    rng = Random(f"{seed}-{index}")
    plan = crops or CROP_PLAN
    crop = rng.choices(list(plan), [share for share, _, _ in plan.values()])[0]
    _, pages, room = plan[crop]
    documents = []
    for kind in rng.choices(list(mix), list(mix.values()), k=pages):
        document = make_document(rng, kind, crop)
        chosen = choose_questions(rng, document, processor, room)
        documents.append((document, chosen or document.questions[:1]))
    return assemble_batch(processor, crop, documents)


def _read_positions(processor: Processor, document: Document, questions: list[Question]) -> np.ndarray:
    """For every answer token of a page, each answer's eos included, the sequence position where it is read."""
    positions = block_positions(document) + IMAGE_START
    read_at: list[int] = []
    for question in questions:
        characters = character_targets(document, question, positions)
        for start, stop in processor.tokenizer.encode(question.answer, add_special_tokens=False).offsets:
            known = [target for target in characters[start:stop] if target != NOWHERE]
            read_at.append(known[0] if known else NOWHERE)
        read_at.append(NOWHERE)
    return np.array(read_at, np.int64)


def _subject_positions(processor: Processor, page: tuple[Document, list[Question]], ids: np.ndarray) -> np.ndarray:
    """For every text token of a page's conversation the sequence position of what a question names there."""
    document, questions = page
    positions = block_positions(document) + IMAGE_START
    found, start = np.full(len(ids), NOWHERE, np.int64), 0
    for number, question in enumerate(questions):
        before = " " if number else "\n"
        encoding = processor.tokenizer.encode(before + question.question, add_special_tokens=False)
        start = _find(ids, np.array(encoding.ids), start)
        characters = [NOWHERE, *subject_targets(document, question, positions)]
        for i, (_, stop) in enumerate(encoding.offsets):
            found[start + i] = characters[stop - 1]
        start += len(encoding.ids)
    return found


def _find(ids: np.ndarray, part: np.ndarray, start: int) -> int:
    """The first index from `start` at which `ids` goes on with `part`."""
    windows = np.lib.stride_tricks.sliding_window_view(ids[start:], len(part))
    return start + int(np.flatnonzero((windows == part).all(1))[0])


def assemble_batch(processor: Processor, crop: tuple[int, int], documents: list) -> Batch:
    """Encodes (document, questions) pairs of one crop."""
    prompts = [_encode(processor, document, questions) for document, questions in documents]
    block = image_token_count(crop, GEOMETRY)
    start = IMAGE_START + block
    length = max(len(prompt.input_ids) for prompt in prompts) - start
    text = np.full((len(prompts), length), processor.pad_id, np.int64)
    index = np.full((len(prompts), length), -1, np.int16)
    pointer = np.full((len(prompts), length), NOWHERE, np.int64)
    subject = pointer.copy()
    asked: list[Question] = []
    for row, (prompt, (document, questions)) in enumerate(zip(prompts, documents, strict=True)):
        ids, targets = prompt.input_ids[start:], prompt.target_ids[start:] != processor.ignore_id
        assert prompt.images_seq_mask[IMAGE_START:start].all(), "the image block is not where it is expected"
        text[row, : len(ids)] = ids
        ends = np.cumsum(ids == processor.eos_id) - (ids == processor.eos_id)
        index[row, : len(ids)] = np.where(targets, ends + len(asked), -1)
        asked += questions
        read_at = _read_positions(processor, document, questions)
        where = np.flatnonzero(targets)
        assert len(where) == len(read_at), "answers were encoded differently within the conversation"
        pointer[row, where] = read_at
        subject[row, : len(ids)] = _subject_positions(processor, (document, questions), ids)
    kept = slice(0, 1) if crop == (1, 1) else slice(None)
    tiles = np.stack([np.rint((prompt.tiles[kept] * 0.5 + 0.5) * 255).astype(np.uint8) for prompt in prompts])
    labels = [tile_labels(document) for document, _ in documents]
    stacked = [np.stack([getattr(label, name) for label in labels]) for name in LABELS]
    before = np.stack([prompt.input_ids[:IMAGE_START] for prompt in prompts])
    return Batch(crop, tiles, before, text, index, pointer, subject, asked, *stacked)


def _render(queue, seed: str, schedule, start: int, step: int) -> None:
    os.nice(3)
    processor, index = load_processor(), start
    parent = os.getppid()
    while os.getppid() == parent:
        mix, crops = schedule(index)
        batch = make_batch(processor, seed, index, mix, crops)
        while os.getppid() == parent:  # a killed trainer must not leave this process waiting for ever
            try:
                queue.put(batch, timeout=5)
                break
            except Full:
                continue
        index += step


def batch_stream(seed: str, schedule, start: int, workers: int = 1) -> Iterator[Batch]:
    """Batches `start`, start + 1, … rendered in `workers` processes; `schedule(index)` gives (mix, crop plan)."""
    context = multiprocessing.get_context("spawn")
    renderers = []
    for i in range(workers):
        queue = context.Queue(maxsize=6)
        process = context.Process(target=_render, args=(queue, seed, schedule, start + i, workers), daemon=True)
        process.start()
        renderers.append((queue, process))
    while True:
        for queue, process in renderers:
            yield _taken(queue, process)


def _taken(queue, process) -> Batch:
    """The next batch of a renderer. Raises RuntimeError when it has ended, whose traceback is then on stderr."""
    while True:
        try:
            return queue.get(timeout=5)
        except Empty:
            if not process.is_alive():
                raise RuntimeError(f"the process that renders pages ended with {process.exitcode}") from None

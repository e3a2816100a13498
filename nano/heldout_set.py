"""Makes the held-out set: `python -m vl2.nano.heldout_set --out nano/heldout`.

Pages come from another seed than training's and are kept a little smaller, so that the set stays below 2.5 MB; each is
asked several questions. One JSON object a line: id, image, task, question, answer, boxes, kind, crop.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from random import Random

from vl2.nano.batches import HELD_OUT_SEED
from vl2.nano.documents import Document, make_document
from vl2.nano.questions import Question

LARGEST_SCALE = 1.1
LONGEST_READING = 24  # characters; a whole page would be judged by its worst letter
# Kind of document → pages of it, questions taken from each.
PAGES = {"word": (26, 2), "lines": (20, 6), "receipt": (15, 8), "form": (14, 7), "table": (20, 8), "chart": (20, 6),
         "shapes": (28, 9)}
CROPS = {(1, 1): 50, (2, 1): 17, (1, 2): 17, (2, 2): 6, (3, 1): 5, (1, 3): 5}


def pick_questions(rng: Random, document: Document, count: int) -> list[Question]:
    """`count` different questions of a page: at most one location, four of reading, three of counting."""
    offered = [q for q in document.questions if q.task != "ocr" or len(q.answer) <= LONGEST_READING]
    picked, taken = [], Counter()
    rng.shuffle(offered)
    limits = {"grounding": 1, "ocr": 4, "count": 3}
    for question in offered:
        if taken[question.task] < limits.get(question.task, count) and len(picked) < count:
            if question.question not in {other.question for other in picked}:
                picked.append(question)
                taken[question.task] += 1
    return picked


def held_out_pages() -> list[tuple[Document, list[Question]]]:
    """Every page of the set with its questions; always the same."""
    pages = []
    for kind, (number, count) in PAGES.items():
        for index in range(number):
            rng = Random(f"{HELD_OUT_SEED}-{kind}-{index}")
            crop = rng.choices(list(CROPS), list(CROPS.values()))[0]
            document = make_document(rng, kind, crop, LARGEST_SCALE)
            pages.append((document, pick_questions(rng, document, count)))
    return pages


def write_held_out(folder: Path) -> Counter:
    """Writes heldout.jsonl and images/*.png; returns the number of questions by task."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    counts, numbered = Counter(), Counter()
    with (folder / "heldout.jsonl").open("w", encoding="utf-8") as file:
        for document, questions in held_out_pages():
            name = f"images/{document.kind}-{numbered[document.kind]:02d}.png"
            numbered[document.kind] += 1
            document.image.save(folder / name, optimize=True)
            for question in questions:
                line = {"id": sum(counts.values()), "image": name, "task": question.task,
                        "question": question.question, "answer": question.answer,
                        "boxes": [list(box) for box in question.boxes], "kind": document.kind,
                        "crop": list(document.crop)}
                file.write(json.dumps(line) + "\n")
                counts[question.task] += 1
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vl2.nano.heldout_set", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    counts = write_held_out(parser.parse_args(arguments).out)
    print(json.dumps({"questions": sum(counts.values()), **counts}))


if __name__ == "__main__":
    main()

"""Question phrasings and answer forms, one table; every document asks through these."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from vl2.nano.pages import Box

PHRASINGS = {
    "read": ("Read the text.", "What does it say?", "What is the text?", "Read all the text.", "Transcribe the text."),
    "line": ("Read line {}.", "What is in line {}?", "What does line {} say?"),
    "field": ("What is the {}?", "What is the {}?", "Give the {}."),
    "price": ("What is the price of {}?", "How much is {}?", "What does {} cost?"),
    "total": ("What is the total?", "How much is the total?", "Give the total."),
    "shop": ("What is the name of the shop?", "Which shop is it?"),
    "item": ("Which item costs {}?", "What costs {}?"),
    "cell": ("What is the {} of {}?", "Give the {} of {}.", "What is the {} for {}?"),
    "bar": ("What is the value of {}?", "How high is the bar {}?", "Read the value of {}."),
    "highest": ("Which bar is highest?", "What is the highest bar?"),
    "lowest": ("Which bar is lowest?", "What is the lowest bar?"),
    "locate": ("Locate the word {}.", "Where is the word {}?", "<|ref|>{}<|/ref|>", "Locate {}."),
    "locate_shape": ("Locate the {}.", "Where is the {}?", "<|ref|>{}<|/ref|>"),
    "count": ("How many {} are there?", "How many {} are in the image?"),
    "colour": ("What colour is the {}?", "What is the colour of the {}?"),
}
# The task each phrasing belongs to in evaluations.
TASKS = {
    "read": "ocr", "line": "ocr", "field": "key_value", "price": "key_value", "total": "key_value", "shop": "key_value",
    "item": "key_value", "cell": "table", "bar": "chart", "highest": "chart", "lowest": "chart", "locate": "grounding",
    "locate_shape": "grounding", "count": "count", "colour": "colour",
}


@dataclass(frozen=True)
class Question:
    """task: one of TASKS' values; boxes are in the answer's 0–999 frame, empty for other tasks."""

    task: str
    question: str
    answer: str
    boxes: tuple[tuple[int, int, int, int], ...] = ()


def ask(rng: Random, kind: str, answer: str, *subjects: str) -> Question:
    """A question of `kind` in one of its phrasings about `subjects`."""
    return Question(TASKS[kind], rng.choice(PHRASINGS[kind]).format(*subjects), answer)


def locate(rng: Random, subject: str, boxes: list[Box], size: tuple[int, int], kind: str = "locate") -> Question:
    """A grounding question whose answer gives `boxes` (image pixels) as integers 0–999 of the image's sides."""
    scaled = tuple(normalised_box(box, size) for box in boxes)
    listed = ", ".join(f"[{', '.join(map(str, box))}]" for box in scaled)
    answer = f"<|ref|>{subject}<|/ref|><|det|>[{listed}]<|/det|>"
    text = rng.choice(PHRASINGS[kind]).format(subject)
    return Question(TASKS[kind], text, answer, scaled)


def normalised_box(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Image pixels → 0–999; 999 is one past the last pixel (spec 12)."""
    x0, y0, x1, y1 = (round(min(max(v / size[i % 2], 0.0), 1.0) * 999) for i, v in enumerate(box))
    return x0, y0, x1, y1

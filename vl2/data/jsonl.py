"""Data: JSON lines, one question a line (quantization guide, section 4.4).

    {"id": …, "image": "page.png", "question": "What is the total?", "answers": ["12.50", "12.5"]}

`image` or `images` are paths relative to the file, or absent in a text question; `question` is required; `answers`
(or `answer`) are those that count as right. A line with `conversations` is read as a record of a LLaVA file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vl2.data.llava_json import llava_sample
from vl2.data.sample import BadRow, Ignored, Row, Sample, fault_of_texts, question_sample

_CONVERSATION = {"image", "images", "question", "answers", "answer", "conversations"}
_READ = {"id", *_CONVERSATION}


def read_jsonl(path: Path) -> Iterator[Row]:
    """One sample or bad row for each line that is not blank."""
    ignored: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            source = f"{path}:{number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield BadRow(source, f"not JSON in UTF-8: {error}")
                continue
            if not isinstance(record, dict):
                yield BadRow(source, f"a JSON {type(record).__name__}, expected an object")
                continue
            if fault := fault_of_texts(record):
                yield BadRow(source, fault)
                continue
            yield from (Ignored(f"field {name!r}") for name in sorted(record.keys() - _READ - ignored))
            ignored |= record.keys()
            yield _sample(record, source, path.parent)


def _sample(record: dict[str, Any], source: str, folder: Path) -> Sample | BadRow:
    if "conversations" in record:
        return llava_sample(record, source, folder)
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        return BadRow(source, f"`question` is {question!r}, expected text")
    if "image" in record and "images" in record:
        return BadRow(source, "has both `image` and `images`, expected one of them")
    images = image_paths(record.get("images", record.get("image", [])), folder)
    if images is None:
        return BadRow(source, "`image` is no path; expected a path, or a list of paths in `images`")
    answers = answer_texts(record)
    if answers is None:
        return BadRow(source, f"the answer is {record.get('answers', record.get('answer'))!r}, expected text")
    facts = {name: value for name, value in record.items() if name not in _CONVERSATION}
    return question_sample(source, question, images, answers, facts)


def answer_texts(record: dict[str, Any]) -> list[str] | None:
    """`answers` or `answer` of a record as a list without empty ones; None when one is neither text nor a number."""
    value = record.get("answers", record.get("answer"))
    values = value if isinstance(value, list) else [value]
    if not all(item is None or isinstance(item, (str, int, float)) for item in values):
        return None
    return [str(item) for item in values if item not in (None, "")]


def image_paths(value: Any, folder: Path) -> tuple[Path, ...] | None:
    """A path or a list of paths relative to `folder`; None when it is neither."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in values):
        return None
    return tuple(folder / name for name in values)

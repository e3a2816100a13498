"""Data: LLaVA's JSON, an array of records, read one at a time however long the file is.

    [{"id": …, "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\n…"}, {"from": "gpt", …}]}, …]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vl2.data.sample import BadRow, Ignored, Row, Sample, fault_of_texts
from vl2.errors import VL2Error
from vl2.prompt import Message

_CONVERSATION = {"image", "images", "conversations"}
_READ = {"id", *_CONVERSATION}
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_BLOCK = 1 << 20
_LONGEST_RECORD = 64 << 20


def read_llava(path: Path) -> Iterator[Row]:
    """One sample or bad row for each record.

    Raises VL2Error naming the line where the file stops being a JSON array: what follows cannot be told apart.
    """
    ignored: set[str] = set()
    for line, record in iter_json_array(path):
        source = f"{path}:{line}"
        if not isinstance(record, dict):
            yield BadRow(source, f"a JSON {type(record).__name__}, expected an object")
            continue
        if fault := fault_of_texts(record):
            yield BadRow(source, fault)
            continue
        yield from (Ignored(f"field {name!r}") for name in sorted(record.keys() - _READ - ignored))
        ignored |= record.keys()
        yield llava_sample(record, source, path.parent)


def llava_sample(record: dict[str, Any], source: str, folder: Path) -> Sample | BadRow:
    """The conversation of one record, ended by an empty answer where a human speaks last. Image paths are relative
    to `folder`."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return BadRow(source, "`conversations` is missing or empty")
    value = record.get("images", record.get("image")) or []
    images = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in images):
        return BadRow(source, f"`image` is {value!r}, expected a path or a list of paths")
    messages, used = [], 0
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
            return BadRow(source, f"a turn is {str(turn)[:60]}, expected `from` ({', '.join(_ROLES)}) and `value`")
        count = turn["value"].count("<image>")
        named = tuple(folder / name for name in images[used : used + count])
        messages.append(Message(_ROLES[turn["from"]], turn["value"], named))
        used += count
    if used != len(images):
        return BadRow(source, f"the conversation has {used} <image>, the record {len(images)} images")
    if messages[-1].role != "assistant":
        messages.append(Message("assistant", ""))
    facts = {name: value for name, value in record.items() if name not in _CONVERSATION}
    return Sample(tuple(messages), source, tuple(filter(None, [messages[-1].content])), facts)


def iter_json_array(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and value of each element of a JSON array, with about one element in memory."""
    with path.open(encoding="utf-8-sig") as file:
        text = _Text(file, path)
        if text.next_symbol() != "[":
            raise VL2Error(f"{text.place} begins with {text.buffer[:20]!r}, expected the JSON array of a LLaVA file",
                           "JSON lines belong in a file named .jsonl")
        text.drop(1)
        if text.next_symbol() != "]":
            yield text.line, text.take_value()
            while text.next_symbol() == ",":
                text.drop(1)
                text.next_symbol()
                yield text.line, text.take_value()
        if text.next_symbol() != "]":
            raise VL2Error(f"{text.place} has {text.buffer[:20]!r} after a record, expected ',' or ']'",
                           "mend the file or fetch it again")


class _Text:
    """The part of a file that is not consumed yet, and the line it begins on."""

    def __init__(self, file: TextIO, path: Path):
        self._file, self._path, self._decoder = file, path, json.JSONDecoder()
        self.buffer, self.line = "", 1

    @property
    def place(self) -> str:
        return f"{self._path}:{self.line}"

    def next_symbol(self) -> str:
        """The next character that is not blank, left in place. Raises VL2Error at the end of the file."""
        while True:
            self.drop(len(self.buffer) - len(self.buffer.lstrip()))
            if self.buffer:
                return self.buffer[0]
            if not self._grow():
                raise VL2Error(f"{self.place} ends in the middle of its JSON array", "fetch the file again")

    def take_value(self) -> Any:
        """The JSON value that the buffer begins with. Raises VL2Error naming the line when it is none."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self.buffer)
            except (ValueError, RecursionError) as error:
                if len(self.buffer) > _LONGEST_RECORD or not self._grow():
                    raise VL2Error(f"{self.place} is not JSON: {error}", "mend the record") from error
            else:
                if end < len(self.buffer) or not self._grow():  # a number could go on in the next block
                    self.drop(end)
                    return value

    def drop(self, count: int) -> None:
        self.line += self.buffer.count("\n", 0, count)
        self.buffer = self.buffer[count:]

    def _grow(self) -> bool:
        """Doubles what is buffered, so that a long record is parsed a few times, not many. False at the file's end."""
        try:
            more = self._file.read(max(_BLOCK, len(self.buffer)))
        except UnicodeDecodeError as error:
            raise VL2Error(f"{self._path} is not text in UTF-8: {error}", "convert it to UTF-8") from error
        self.buffer += more
        return bool(more)

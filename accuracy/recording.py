"""A recording: what a reference bundle answered to an evaluation, and its distribution at every seen position.

    recording.json   what it was made from and with; docs/formats.md describes it
    rows.jsonl       a question a line: its sha256, the answer and how many positions it has
    positions.bin    a fixed number of bytes a position, little-endian, in the order of the rows

The final hidden states would take 2.5 kB a position, but the recipient would need the reference's 331 MB `lm_head` with
them, and a bundle's decoder does not give them. The likeliest 1,024 tokens with the rest as one take 8 kB
(vl2.accuracy.logits says what is exact).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vl2.accuracy.journal import ROWS_NAME, read_rows
from vl2.accuracy.logits import Kept
from vl2.accuracy.walk import Position, Reply
from vl2.errors import VL2Error
from vl2.json_file import from_json, read_json, to_json

RECORDING_NAME, POSITIONS_NAME = "recording.json", "positions.bin"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class BundleFacts:
    """Which bundle ran, and where. manifest_sha256: of its manifest, which holds the hashes of all its files;
    quantization: as the manifest has it."""

    path: str
    variant: str
    scheme: str
    lowering: str
    quantization: dict | None
    source: str
    manifest_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    size_bytes: int
    backend: str

    def identity(self) -> dict[str, str]:
        """What the logits follow from: the files, and what runs them, without the number of threads."""
        return {"bundle": self.manifest_sha256, "backend": re.sub(r"\b\d+ threads?, ", "", self.backend)}


@dataclass(frozen=True)
class RecordingFacts:
    """recording.json. data_sha256: of the questions asked; top: tokens kept a position; positions: by kind."""

    schema_version: int
    vl2_version: str
    bundle: BundleFacts
    data: str
    data_sha256: str
    rows: int
    max_new_tokens: int
    prompt_text: bool
    prefill_chunk: int
    top: int
    positions: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class RecordedPosition:
    """A position of the reference: what kind, the token that followed, its log-probability, what was kept."""

    kind: int
    target: int
    log_p: float
    kept: Kept


@dataclass(frozen=True)
class RecordedRow:
    """A question's answer and the slice of its positions."""

    source: str
    sha256: str
    reply: Reply
    first: int
    count: int


class Recording:
    """A finished recording, its positions read by memory map. Raises VL2Error where it is broken or newer."""

    def __init__(self, folder: Path):
        path = folder / RECORDING_NAME
        content = read_json(path)
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise VL2Error(f"{path}: schema_version is {version!r}, this vl2 reads {SCHEMA_VERSION}",
                           "record again with this version")
        self.folder, self.facts = folder, from_json(RecordingFacts, content, str(path))
        self.rows = _recorded_rows(read_rows(folder / ROWS_NAME))
        self._positions = _map_positions(folder / POSITIONS_NAME, position_dtype(self.facts.top,
                                                                                 self.facts.bundle.vocab_size))
        total = sum(row.count for row in self.rows)
        if len(self.rows) != self.facts.rows or len(self._positions) != total:
            raise VL2Error(f"{folder} holds {len(self.rows)} rows and {len(self._positions)} positions, its facts say "
                           f"{self.facts.rows} and {total}", "copy the recording again, or record again")

    def positions(self, row: RecordedRow) -> list[RecordedPosition]:
        """The positions of a row, in the order of its walk."""
        return [_from_entry(entry) for entry in self._positions[row.first:row.first + row.count]]


def write_facts(folder: Path, facts: RecordingFacts) -> None:
    """Writes recording.json, which makes a folder a recording."""
    (folder / RECORDING_NAME).write_text(json.dumps(to_json(facts), indent=2) + "\n", encoding="utf-8")


def position_dtype(top: int, vocab_size: int) -> np.dtype:
    """One position in positions.bin; the ids are left out where all tokens are kept."""
    kept = min(top, vocab_size)
    fields = [("kind", "<i4"), ("target", "<i4"), ("top1", "<i4"), ("log_p", "<f4"), ("log_rest", "<f4"),
              ("log_probs", "<f4", (kept,))]
    return np.dtype(fields if kept == vocab_size else [*fields, ("ids", "<i4", (kept,))])


def to_entry(position: Position, kept: Kept, log_p: float, dtype: np.dtype) -> np.ndarray:
    """[1] of `dtype` for a position and what is kept of its logits; log_p: of its target."""
    entry = np.zeros(1, dtype)
    values = {"kind": position.kind, "target": position.target, "top1": kept.top1, "log_p": log_p,
              "log_rest": kept.log_rest, "log_probs": kept.log_probs, "ids": kept.ids}
    for name in dtype.names:
        entry[name][0] = values[name]
    return entry


def row_to_json(source: str, sha256: str, reply: Reply, positions: int) -> dict[str, Any]:
    """A line of rows.jsonl."""
    return {"source": source, "sha256": sha256, "text": reply.text, "token_ids": list(reply.token_ids),
            "stop_reason": reply.stop_reason, "positions": positions}


def append_positions(path: Path, entries: np.ndarray) -> None:
    """Writes positions to the disk, before the row that counts them."""
    with path.open("ab") as file:
        file.write(entries.tobytes())
        file.flush()
        os.fsync(file.fileno())


def cut_positions(path: Path, rows: Sequence[dict[str, Any]], dtype: np.dtype) -> None:
    """Drops the positions of a row that was not finished when the recording was interrupted."""
    path.touch()
    size = sum(row["positions"] for row in rows) * dtype.itemsize
    if path.stat().st_size < size:
        raise VL2Error(f"{path} has {path.stat().st_size} bytes, its rows need {size}",
                       f"remove {path.parent} and begin again")
    os.truncate(path, size)


def reply_from_json(row: dict[str, Any]) -> Reply:
    """The answer in a line of rows.jsonl."""
    return Reply(tuple(row["token_ids"]), row["text"], row["stop_reason"])


def _recorded_rows(rows: list[dict[str, Any]]) -> list[RecordedRow]:
    firsts = np.cumsum([0, *(row["positions"] for row in rows)]).tolist()
    return [RecordedRow(row["source"], row["sha256"], reply_from_json(row), first, row["positions"])
            for row, first in zip(rows, firsts, strict=False)]


def _map_positions(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size if path.is_file() else 0
    if size == 0 or size % dtype.itemsize:
        raise VL2Error(f"{path} has {size} bytes, expected a multiple of {dtype.itemsize}", "copy the recording again")
    return np.memmap(path, dtype, "r")


def _from_entry(entry: np.void) -> RecordedPosition:
    ids = entry["ids"] if "ids" in entry.dtype.names else None
    kept = Kept(ids, entry["log_probs"], entry["log_rest"], int(entry["top1"]))
    return RecordedPosition(int(entry["kind"]), int(entry["target"]), float(entry["log_p"]), kept)

"""Calibration data: any of the formats users have, sampled, checked and hashed before the long work begins."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random

from vl2.calib.image_folder import read_image_folder
from vl2.calib.synthetic import iter_synthetic
from vl2.data.files import image_sha256, open_rows
from vl2.data.sample import BadRow, Ignored, Row, Sample
from vl2.errors import VL2Error
from vl2.image import load_image
from vl2.prompt import Processor

_SHOWN = 5  # bad rows in an error message


@dataclass(frozen=True)
class DataOptions:
    """What of the data is used.

    samples: at most so many conversations, None for all; max_tokens: at most so many positions together; max_length: a
    longer conversation is a bad row; tolerate: the share of bad rows above which the run stops; prompt: asked of each
    image of a folder.
    """

    samples: int | None = 128
    max_tokens: int | None = 32768
    max_length: int = 4096
    seed: int = 0
    tolerate: float = 0.05
    prompt: str = "Read all the text in the image."

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise VL2Error(f"{name} is {value}, expected at least 1")
        if not 0 <= self.tolerate <= 1:
            raise VL2Error(f"tolerate is {self.tolerate}, expected a share between 0 and 1")


@dataclass(frozen=True)
class CheckedSample:
    """A sample that encodes. tokens: positions, of which image_tokens are an image's; tiles: for the tower;
    image_sha256: of each image's size and RGB pixels, whatever file it came in."""

    sample: Sample
    tokens: int
    image_tokens: int
    tiles: int
    image_sha256: tuple[str, ...]


@dataclass(frozen=True)
class CalibrationData:
    """What is calibrated on, in random order, and the account of the rest.

    rows: rows read; bad_rows: all of them; ignored: what was passed over on purpose; left_out: checked samples beyond
    `max_tokens`; sha256: of the texts and pixels of `samples`.
    """

    format: str
    path: str | None
    options: DataOptions
    samples: tuple[CheckedSample, ...]
    rows: int
    bad_rows: tuple[BadRow, ...]
    ignored: tuple[str, ...]
    left_out: int
    sha256: str


def read_data(path: Path | None, processor: Processor, options: DataOptions) -> CalibrationData:
    """Reads, samples and checks calibration data; without a path, synthetic documents.

    Every row is read; images are decoded and conversations encoded for those chosen by the seed only. A smaller sample
    with the same seed is the beginning of a larger one. Raises VL2Error on an unknown format, when more than `tolerate`
    of the rows (or of the chosen ones) are bad, and when nothing is left.
    """
    name, rows = _open(path, options)
    account = _Account()
    chosen = _choose(account.samples_of(rows), options)
    _refuse_too_many(account.bad, account.rows, options)
    checked, unusable = _check(chosen, processor, options.max_length)
    _refuse_too_many(unusable, len(chosen), options)
    used = _within_budget(checked, options)
    return CalibrationData(
        format=name, path=None if path is None else str(path), options=options, samples=tuple(used), rows=account.rows,
        bad_rows=(*account.bad, *unusable), ignored=tuple(account.ignored), left_out=len(checked) - len(used),
        sha256=_sha256(used),
    )


def _open(path: Path | None, options: DataOptions) -> tuple[str, Iterator[Row]]:
    if path is None:
        if options.samples is None:
            raise VL2Error("synthetic documents have no end", "say how many samples to draw")
        return "synthetic documents", islice(iter_synthetic(options.seed), options.samples)
    if path.is_dir():
        return "image folder", read_image_folder(path, options.prompt)
    if not path.exists():
        raise VL2Error(f"{path}: no such file or folder", "give calibration data, or none for synthetic documents")
    return open_rows(path)


@dataclass
class _Account:
    """What was read beside the samples that passed through."""

    rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def samples_of(self, rows: Iterable[Row]) -> Iterator[Sample]:
        for row in rows:
            if isinstance(row, Ignored):
                self.ignored.append(row.what)
                continue
            self.rows += 1
            if isinstance(row, BadRow):
                self.bad.append(row)
            else:
                yield row


def _choose(samples: Iterator[Sample], options: DataOptions) -> list[Sample]:
    """A random choice in random order. Each row draws its own key, so growing the sample only appends to it."""
    random = Random(options.seed)
    keyed = ((random.random(), index, sample) for index, sample in enumerate(samples))
    smallest = sorted(keyed) if options.samples is None else heapq.nsmallest(options.samples, keyed)
    return [sample for _, _, sample in smallest]


def _check(samples: list[Sample], processor: Processor, max_length: int) -> tuple[list[CheckedSample], list[BadRow]]:
    checked, bad = [], []
    for sample in samples:
        try:
            conversation = sample.opened()
            images = [load_image(image) for message in conversation for image in message.images]
            prompt = processor.encode(conversation, inference=not sample.is_answered)
        except VL2Error as error:
            bad.append(BadRow(sample.source, error.message))
            continue
        if len(prompt.input_ids) > max_length:
            bad.append(BadRow(sample.source, f"has {len(prompt.input_ids)} tokens, expected at most {max_length}"))
            continue
        hashes = tuple(image_sha256(image) for image in images)
        counts = len(prompt.input_ids), int(prompt.images_seq_mask.sum()), len(prompt.tiles)
        checked.append(CheckedSample(sample, *counts, hashes))
    return checked, bad


def _refuse_too_many(bad: list[BadRow], rows: int, options: DataOptions) -> None:
    listed = "".join(f"\n{row}" for row in bad[:_SHOWN])
    if len(bad) == rows:
        raise VL2Error(f"none of {rows} rows of the calibration data can be used{listed}",
                       "mend the rows, or give other data")
    if len(bad) > options.tolerate * rows:
        raise VL2Error(f"{len(bad)} of {rows} rows of the calibration data are bad, {options.tolerate:.0%} are "
                       f"tolerated{listed}", "mend the rows, or tolerate more of them")


def _within_budget(checked: list[CheckedSample], options: DataOptions) -> list[CheckedSample]:
    """The beginning of the list that fits. Stopping at the first that does not keeps the choice free of its length."""
    total = 0
    for count, sample in enumerate(checked):
        total += sample.tokens
        if options.max_tokens is not None and total > options.max_tokens:
            if count == 0:
                raise VL2Error(f"{sample.sample.source} alone has {sample.tokens} tokens, more than the "
                               f"{options.max_tokens} allowed", "allow more tokens")
            return checked[:count]
    return checked


def _sha256(samples: list[CheckedSample]) -> str:
    digest = hashlib.sha256()
    for checked in samples:
        turns = [(message.role, message.content) for message in checked.sample.conversation]
        digest.update(json.dumps([turns, checked.image_sha256]).encode())
    return digest.hexdigest()

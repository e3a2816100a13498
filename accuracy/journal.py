"""Rows of long work, one JSON object a line, in a folder beside its place; an interrupted run goes on behind the last.

    .NAME.partial/job.json     what the work is made from: another job in the same place begins anew
    .NAME.partial/rows.jsonl   finished rows in order
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from vl2.errors import VL2Error

ROWS_NAME = "rows.jsonl"
_JOB_NAME = "job.json"


class Journal:
    """The rows of one job. folder: where other files of the job may lie too."""

    def __init__(self, out: Path, job: dict[str, Any]):
        self.out, self.folder = out, out.parent / f".{out.name}.partial"
        if self._found_job() != job:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_whole(self.folder / _JOB_NAME, json.dumps(job))
        self.rows = read_rows(self.folder / ROWS_NAME, cut_unfinished=True)

    def append(self, row: dict[str, Any]) -> None:
        """Writes a finished row to the disk."""
        with (self.folder / ROWS_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)

    def publish(self) -> None:
        """Renames the folder into its place; what was there goes once the new one is whole."""
        (self.folder / _JOB_NAME).unlink()
        older = self.out.parent / f".{self.out.name}.older"
        if self.out.exists():
            os.rename(self.out, older)
        os.rename(self.folder, self.out)
        shutil.rmtree(older, ignore_errors=True)

    def _found_job(self) -> Any:
        try:
            return json.loads((self.folder / _JOB_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def refuse_existing(out: Path, force: bool, own: str) -> None:
    """Raises VL2Error when `out` exists and may not be replaced: without `force`, or where the file `own` that every
    output of this kind holds is missing."""
    if not out.exists():
        return
    if not force:
        raise VL2Error(f"{out} exists", "give another place, or --force to replace it")
    if not (out / own).is_file():
        raise VL2Error(f"{out} exists and has no {own}: it was not written by this command", "give another place")


def read_rows(path: Path, cut_unfinished: bool = False) -> list[dict[str, Any]]:
    """The rows of a file; a last line without its end is left out, and cut off when asked for."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if cut_unfinished and len(whole) < len(data):
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.decode("utf-8").splitlines()]
    except ValueError as error:
        raise VL2Error(f"{path} cannot be read: {error}", f"remove {path.parent} and begin again") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it there."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)

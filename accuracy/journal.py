"""Rows of long work, one JSON object a line, in a folder beside its place; an interrupted run goes on behind the last.

    .NAME.partial/job.json     what the work is made from: another job in the same place begins anew
    .NAME.partial/rows.jsonl   finished rows in order
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vl2.errors import VL2Error
from vl2.folder_lock import work_folder

ROWS_NAME = "rows.jsonl"
_JOB_NAME = "job.json"


@contextmanager
def held_place(out: Path, what: str) -> Iterator[None]:
    """Keeps other processes from working towards `out`; what: who else may, such as "recording".

    Raises VL2Error while one does. The journal's folder itself is held, also once it has its place.
    """
    with work_folder(_folder_of(out), what):
        yield


def _folder_of(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


class Journal:
    """The rows of one job, whose place is held (`held_place`). folder: where other files of the job may lie too."""

    def __init__(self, out: Path, job: dict[str, Any]):
        self.out, self.folder = out, _folder_of(out)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._found_job() != job:
            _clear(self.folder)
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
        older = self.out.parent / f".{self.out.name}.older"
        if self.out.exists():
            shutil.rmtree(older, ignore_errors=True)
            os.rename(self.out, older)
        os.rename(self.folder, self.out)
        # Last: killed before the renaming, the job could not go on without it.
        (self.out / _JOB_NAME).unlink()
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
        # Not str.splitlines: texts hold U+2028 and the like, which end no line of JSON.
        return [json.loads(line.decode("utf-8")) for line in whole.split(b"\n")[:-1]]
    except ValueError as error:
        raise VL2Error(f"{path} cannot be read: {error}", f"remove {path.parent} and begin again") from error


def _clear(folder: Path) -> None:
    """Removes what is in a folder and leaves the folder, which this process holds."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it there."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)

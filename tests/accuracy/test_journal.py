"""Rows of long work: lines of any text, one process at a time, and a place that is changed by one renaming."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vl2.accuracy.journal import Journal, held_place, read_rows
from vl2.errors import VL2Error

TEXTS = ["a\u2028b", "a\u2029b", "a\x85b", "a\x1cb", "a\nb", "a\r\nb"]


def test_rows_hold_every_separator_that_a_model_may_write(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", {})
    for text in TEXTS:
        journal.append({"text": text})
    assert [row["text"] for row in Journal(tmp_path / "out", {}).rows] == TEXTS


def test_a_broken_line_is_told_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(VL2Error, match=r"rows\.jsonl cannot be read"):
        read_rows(path)


def test_a_place_belongs_to_one_at_a_time_and_an_idle_one_leaves_nothing(tmp_path: Path) -> None:
    with held_place(tmp_path / "out", "recording"):
        with pytest.raises(VL2Error, match="another recording writes to"), held_place(tmp_path / "out", "recording"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_another_job_clears_the_folder_that_is_held_and_leaves_it_held(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held_place(out, "recording"):
        first = Journal(out, {"top": 1})
        first.append({"text": "x"})
        (first.folder / "reference").mkdir()
        assert Journal(out, {"top": 2}).rows == [] and not (first.folder / "reference").exists()
        with pytest.raises(VL2Error, match="another recording"), held_place(out, "recording"):
            pass


@pytest.mark.parametrize("renamings", [0, 1])
def test_a_kill_while_publishing_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamings: int) -> None:
    out, done, real = tmp_path / "out", [], os.rename
    out.mkdir()
    (out / "older").touch()
    (tmp_path / ".out.older" / "left").mkdir(parents=True)

    def dies(*paths: Path) -> None:
        if len(done) == renamings:
            raise KeyboardInterrupt
        done.append(real(*paths))

    journal = Journal(out, {"top": 1})
    journal.append({"text": "x"})
    monkeypatch.setattr(os, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        journal.publish()
    monkeypatch.undo()
    again = Journal(out, {"top": 1})
    assert again.rows == [{"text": "x"}]
    again.publish()
    assert [path.name for path in out.iterdir()] == ["rows.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

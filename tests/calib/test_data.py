from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vl2.calib.data import CalibrationData, DataOptions, read_data
from vl2.data.files import image_sha256
from vl2.data.llava_json import iter_json_array
from vl2.data.sample import EncodedImage
from vl2.errors import VL2Error
from vl2.nano.pages import font_folder
from vl2.prompt import Processor

ALL = DataOptions(samples=None, max_tokens=None)


def encoded(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(r + "\n" if isinstance(r, str) else json.dumps(r) + "\n" for r in records), "utf-8")
    return path


def write_table(path: Path, *rows: tuple[str, ...]) -> Path:
    path.write_text("".join("\t".join(row) + "\n" for row in rows), "utf-8")
    return path


def turns(data: CalibrationData) -> list[list[tuple[str, str]]]:
    """Roles and contents in the order of the rows."""
    ordered = sorted(data.samples, key=lambda checked: checked.sample.source)
    return [[(m.role, m.content) for m in checked.sample.conversation] for checked in ordered]


def test_every_image_of_a_folder_is_asked_the_prompt(processor: Processor, goldens: Path) -> None:
    data = read_data(goldens / "images", processor, DataOptions(samples=None, max_tokens=None, prompt="Free OCR."))
    assert len(data.samples) == len(list((goldens / "images").glob("*.png")))
    assert all(turn == [("user", "<image>\nFree OCR."), ("assistant", "")] for turn in turns(data))


def test_files_that_are_no_images_are_named_once(processor: Processor, picture: Path) -> None:
    for name in ("a.txt", "b.txt", "README"):
        (picture.parent / name).write_text("x")
    ignored = read_data(picture.parent, processor, ALL).ignored
    assert set(ignored) == {"files ending in '.txt'", "files without an ending"}


def test_json_lines_give_question_images_and_first_answer(processor: Processor, picture: Path) -> None:
    path = write_lines(picture.parent / "q.jsonl",
                       {"image": "page.png", "question": "Total?", "answers": ["4", "four"]},
                       {"images": ["page.png", "page.png"], "question": "Compare <image> with <image>."},
                       {"question": "Two and two?", "answer": 4, "metric": "exact"})
    data = read_data(path, processor, ALL)
    assert turns(data) == [
        [("user", "<image>\nTotal?"), ("assistant", "4")],
        [("user", "Compare <image> with <image>."), ("assistant", "")],
        [("user", "Two and two?"), ("assistant", "4")],
    ]
    assert data.ignored == ("field 'metric'",)
    assert [len(checked.image_sha256) for checked in sorted(data.samples, key=lambda c: c.sample.source)] == [1, 2, 0]


def test_llava_records_keep_their_turns_and_end_with_an_answer(processor: Processor, picture: Path) -> None:
    conversation = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."},
                    {"from": "human", "value": "Sure?"}]
    path = picture.parent / "llava.json"
    path.write_text(json.dumps([{"id": 1, "image": "page.png", "conversations": conversation}], indent=2), "utf-8")
    assert turns(read_data(path, processor, ALL)) == [
        [("user", "<image>\nWhat?"), ("assistant", "Red."), ("user", "Sure?"), ("assistant", "")]]


def test_tables_take_base64_references_lists_and_choices(processor: Processor, picture: Path) -> None:
    image = encoded(Image.open(picture))
    path = write_table(
        picture.parent / "t.tsv", ("index", "image", "question", "answer", "A", "B", "hint", "split"),
        ("1", "7", "refers to a later row", "x", "", "", "", "dev"),
        ("7", image, '"two\nlines"', "\"['one', 'uno']\"", "", "", "", "dev"),
        ("8", f"\"['{image}', '{image}']\"", "Which?", "B", "cat", "dog", "Look.", "dev"),
    )
    data = read_data(path, processor, ALL)
    assert turns(data) == [
        [("user", "<image>\nrefers to a later row"), ("assistant", "x")],
        [("user", "<image>\ntwo\nlines"), ("assistant", "one")],
        [("user", "<image>\n<image>\nLook.\nWhich?\nA. cat\nB. dog"), ("assistant", "B")],
    ]
    assert [checked.sample.source.rsplit(":", 1)[1] for checked in
            sorted(data.samples, key=lambda c: c.sample.source)] == ["2", "3", "5"]
    assert data.ignored == ("column 'split'",)
    held = [image for checked in data.samples for message in checked.sample.conversation for image in message.images]
    assert {type(image) for image in held} == {EncodedImage}, "decoded pixels of all samples would fill the memory"


def test_tables_take_paths_beside_the_file(processor: Processor, picture: Path) -> None:
    path = write_table(picture.parent / "t.tsv", ("index", "image_path", "question"), ("1", "page.png", "What?"))
    assert turns(read_data(path, processor, ALL)) == [[("user", "<image>\nWhat?"), ("assistant", "")]]


def test_the_same_picture_has_one_hash_as_file_and_as_base64(picture: Path) -> None:
    again = Image.open(io.BytesIO(base64.b64decode(encoded(Image.open(picture)))))
    assert image_sha256(again) == image_sha256(Image.open(picture).convert("RGB"))


def test_without_data_the_projects_own_documents_are_used(
    processor: Processor, synthetic_data: CalibrationData
) -> None:
    assert synthetic_data.format == "synthetic documents" and synthetic_data.path is None
    assert len(synthetic_data.samples) == 3
    assert all(checked.image_tokens > 0 and checked.sample.is_answered for checked in synthetic_data.samples)
    assert len({checked.tokens for checked in synthetic_data.samples}) > 1
    again = read_data(None, processor, DataOptions(samples=3, seed=5))
    assert again.sha256 == synthetic_data.sha256
    assert read_data(None, processor, DataOptions(samples=3, seed=6)).sha256 != synthetic_data.sha256


BAD_LINES = {
    "not json": ("{", "not JSON"),
    "a list": ([1], "a JSON list"),
    "no question": ({"image": "page.png"}, "`question` is None"),
    "both": ({"question": "?", "image": "page.png", "images": []}, "both `image` and `images`"),
    "a number for an image": ({"question": "?", "image": 3}, "`image` is no path"),
    "an answer of another kind": ({"question": "?", "answer": {"a": 1}}, "the answer is"),
    "too few images": ({"question": "<image><image>", "image": "page.png"}, "has 2 <image>, the row 1 images"),
    "a missing image": ({"question": "?", "image": "none.png"}, "none.png: no such image file"),
    "a broken image": ({"question": "?", "image": "bad.jsonl"}, "not an image that Pillow can read"),
    "an image in the answer": ({"question": "?", "answer": "<image>"}, "holds an image"),
    "a strange turn": ({"conversations": [{"from": "robot", "value": "x"}]}, "a turn is"),
    "no turns": ({"conversations": []}, "`conversations` is missing or empty"),
    "an unplaced image": ({"image": "page.png", "conversations": [{"from": "human", "value": "Hi"}]}, "has 0 <image>"),
    "too long": ({"question": "word " * 5000}, "expected at most 4096"),
}


@pytest.mark.parametrize("record, reason", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_reported_by_file_and_line(
    processor: Processor, picture: Path, record: object, reason: str
) -> None:
    path = write_lines(picture.parent / "bad.jsonl", {"question": "Fine?"}, "", record)
    with pytest.raises(VL2Error, match="1 of 2 rows") as caught:
        read_data(path, processor, ALL)
    assert f"{path}:3: " in caught.value.message and reason in caught.value.message
    data = read_data(path, processor, DataOptions(tolerate=0.5))
    assert len(data.samples) == 1 and data.rows == 2
    assert [row.source for row in data.bad_rows] == [f"{path}:3"]


BAD_CELLS = {
    "no image": ("1", "", "?", "has neither image nor image_path"),
    "a reference to nothing": ("1", "99", "?", "no row of this index"),
    "not base64": ("1", "%" * 80, "?", "not base64"),
    "no image in base64": ("1", "A" * 80, "?", "holds no image"),
    "no question": ("1", "8", "", "has no question"),
    "a stray quotation mark": ("1", "8", '"who" said', "no row of a table"),
    "too many cells": ("1", "8", "?\tx\ty", "has 5 cells, the first row names 3 columns"),
}


@pytest.mark.parametrize("index, image, question, reason", BAD_CELLS.values(), ids=BAD_CELLS.keys())
def test_a_bad_row_of_a_table_is_reported_and_the_next_is_read(
    processor: Processor, picture: Path, index: str, image: str, question: str, reason: str
) -> None:
    good = ("8", encoded(Image.open(picture)), "Fine?")
    path = write_table(picture.parent / "t.tsv", ("index", "image", "question"), (index, image, question), good)
    data = read_data(path, processor, DataOptions(tolerate=0.5))
    assert [row.source for row in data.bad_rows] == [f"{path}:2"]
    assert reason in data.bad_rows[0].reason
    assert turns(data) == [[("user", "<image>\nFine?"), ("assistant", "")]]


def test_five_per_cent_of_bad_rows_pass_and_more_do_not(processor: Processor, tmp_path: Path) -> None:
    good = [{"question": f"Question {i}?"} for i in range(19)]
    data = read_data(write_lines(tmp_path / "a.jsonl", *good, "{"), processor, ALL)
    assert (len(data.samples), len(data.bad_rows), data.rows) == (19, 1, 20)
    with pytest.raises(VL2Error, match="2 of 20 rows of the calibration data are bad, 5% are tolerated"):
        read_data(write_lines(tmp_path / "b.jsonl", *good[1:], "{", "{"), processor, ALL)


def broken(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


BROKEN_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda f: f / "none.jsonl", "no such file"),
    "an unknown ending": (lambda f: broken(f, "a.csv", "x"), "the ending '.csv' is unknown"),
    "an empty file": (lambda f: broken(f, "a.jsonl", ""), "none of 0 rows"),
    "lines in a JSON file": (lambda f: broken(f, "a.json", '{"a": 1}\n{"b": 2}\n'), "a.json:1 begins with"),
    "a cut array": (lambda f: broken(f, "a.json", '[{"a": 1},\n'), "a.json:2 ends in the middle"),
    "a broken record": (lambda f: broken(f, "a.json", '[{"a": 1},\n\n{"b" 2}]'), "a.json:3 is not JSON"),
    "no comma": (lambda f: broken(f, "a.json", "[1 2]"), "a.json:1 has '2]' after a record"),
    "latin-1": (lambda f: broken(f, "a.json", '["é"]'.encode("latin-1")), "is not text in UTF-8"),
    "other columns": (lambda f: broken(f, "a.tsv", "a\tb\n1\t2\n"), "has the columns a, b"),
    "a table in latin-1": (lambda f: broken(f, "a.tsv", "image\tquestion\né\t2\n".encode("latin-1")), "a.tsv:2 is not"),
}


@pytest.mark.parametrize("make, message", BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
def test_a_file_that_cannot_be_read_is_refused(
    processor: Processor, tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(VL2Error) as caught:
        read_data(make(tmp_path), processor, ALL)
    assert message in caught.value.message


@pytest.mark.parametrize("options", [{"samples": 0}, {"max_tokens": 0}, {"max_length": 0}, {"tolerate": 1.5}])
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(VL2Error, match="expected"):
        DataOptions(**options)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "q.jsonl", *({"question": f"Number {i}?"} for i in range(30)))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), small=st.integers(1, 15), large=st.integers(15, 40))
def test_a_smaller_sample_is_the_beginning_of_a_larger_one(
    processor: Processor, questions: Path, seed: int, small: int, large: int
) -> None:
    few, many = (read_data(questions, processor, DataOptions(samples=n, seed=seed)).samples for n in (small, large))
    assert (len(few), len(many)) == (small, min(large, 30))
    assert few == many[:small]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budget=st.integers(40, 900))
def test_a_token_budget_is_kept_and_what_is_left_out_is_counted(
    processor: Processor, questions: Path, budget: int
) -> None:
    data = read_data(questions, processor, DataOptions(max_tokens=budget))
    assert sum(checked.tokens for checked in data.samples) <= budget
    assert len(data.samples) + data.left_out == 30
    everything = read_data(questions, processor, ALL).samples
    assert data.samples == everything[: len(data.samples)]


def test_a_conversation_larger_than_the_budget_is_refused(processor: Processor, questions: Path) -> None:
    with pytest.raises(VL2Error, match="alone has"):
        read_data(questions, processor, DataOptions(max_tokens=2))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)),
       indent=st.none() | st.integers(0, 3))
def test_an_array_read_piece_by_piece_equals_the_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list, indent: int | None
) -> None:
    monkeypatch.setattr("vl2.data.llava_json._BLOCK", 3)
    text = json.dumps(values, indent=indent)
    (tmp_path / "a.json").write_text(text, "utf-8")
    found = list(iter_json_array(tmp_path / "a.json"))
    assert [value for _, value in found] == values
    assert all(1 <= line <= text.count("\n") + 1 for line, _ in found)


def test_without_data_and_without_fonts_the_error_says_what_to_install(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    font_folder.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    try:
        with pytest.raises(VL2Error, match="no calibration data were given.*matplotlib") as caught:
            read_data(None, processor, DataOptions(samples=2))
        assert "'.[export]'" in caught.value.hint and "data of your own" in caught.value.hint
    finally:
        font_folder.cache_clear()

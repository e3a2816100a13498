"""Evaluation rows: what is asked, by which metric, and which rows cannot be."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from tests.accuracy.conftest import QUESTIONS, write_questions
from vl2.accuracy.questions import DataOptions, Evaluation, read_questions, refuse_calibrated
from vl2.accuracy.record import OpenBundle
from vl2.errors import VL2Error


@pytest.fixture
def read(reference: OpenBundle):
    def read_with(path: Path, **options) -> Evaluation:
        return read_questions(path, reference.model.engine.processor, DataOptions(**options))
    return read_with


def test_json_lines_give_answers_task_and_metric(read, questions_file: Path) -> None:
    found = read(questions_file)
    assert [q.id for q in found.questions] == list("abcde")
    assert [q.task for q in found.questions] == ["ocr", "ocr", "boxes", "questions", "questions"]
    assert [q.metric for q in found.questions] == ["exact", "exact", "iou", "anls", "exact"]
    assert [len(q.answers) for q in found.questions] == [2, 1, 1, 1, 0]
    assert found.questions[2].answers == ("<|ref|><|/ref|><|det|>[[1, 2, 30, 40]]<|/det|>",)
    assert found.ignored == () and found.rows == 5


def test_questions_on_one_image_share_it_and_a_text_question_stands_alone(read, questions_file: Path) -> None:
    images = [q.image for q in read(questions_file).questions]
    assert images[0] == images[1] and len(set(images)) == 4


def test_a_metric_from_outside_is_for_rows_that_name_none(read, questions_file: Path) -> None:
    assert [q.metric for q in read(questions_file, metric="cer", limit=1).questions] == ["cer"]
    assert read(questions_file, metric="contains").questions[3].metric == "anls"


def test_a_limit_takes_the_first_rows(read, questions_file: Path) -> None:
    few, all_rows = read(questions_file, limit=2), read(questions_file)
    assert few.questions == all_rows.questions[:2] and few.sha256 != all_rows.sha256


def test_the_hash_is_of_what_is_asked_not_of_the_answers(read, questions_file: Path) -> None:
    mended = [{**QUESTIONS[0], "answers": ["z"]}, *QUESTIONS[1:]]
    again = write_questions(questions_file.parent / "mended.jsonl", *mended)
    assert read(again).sha256 == read(questions_file).sha256
    other = write_questions(questions_file.parent / "other.jsonl", {**QUESTIONS[0], "image": "1.png"}, *QUESTIONS[1:])
    assert read(other).sha256 != read(questions_file).sha256


def test_a_vlmevalkit_table_gives_choices_lists_and_categories(read, questions_file: Path) -> None:
    image = base64.b64encode((questions_file.parent / "0.png").read_bytes()).decode()
    path = questions_file.parent / "MMBench.tsv"
    path.write_text("index\timage\tquestion\tanswer\tA\tB\tcategory\n"
                    f"7\t{image}\tWhich?\tB\tcat\tdog\tpets\n8\t7\tTotal?\t\"['4', 'four']\"\t\t\t\n", "utf-8")
    first, second = read(path).questions
    assert (first.id, first.task, first.metric, first.answers) == ("7", "pets", "choice", ("B",))
    assert first.conversation()[0].content == "<image>\nWhich?\nA. cat\nB. dog"
    assert (second.task, second.metric, second.answers) == ("MMBench", "exact", ("4", "four"))
    assert first.image == second.image


def test_a_llava_record_asks_its_last_turn_after_the_ones_before(read, questions_file: Path) -> None:
    turns = [("human", "<image>\nWhat?"), ("gpt", "A bill."), ("human", "Total?"), ("gpt", "4")]
    record = {"id": 1, "image": "0.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    path = questions_file.parent / "llava.json"
    path.write_text(json.dumps([record]), "utf-8")
    question, = read(path).questions
    assert question.answers == ("4",)
    assert [message.content for message in question.conversation()] == ["<image>\nWhat?", "A bill.", "Total?", ""]


def test_images_that_were_calibrated_on_are_refused(read, questions_file: Path, tmp_path: Path) -> None:
    data = read(questions_file)
    for shown, message in ((data.questions[2].image, r"2 of 5 .* the first is .*questions\.jsonl:3"), ("other", None)):
        (tmp_path / "calibration.json").write_text(json.dumps({"sequences": [{"image_sha256": [shown]}]}))
        if message is None:
            refuse_calibrated(data, tmp_path)
        else:
            with pytest.raises(VL2Error, match=message):
                refuse_calibrated(data, tmp_path)


BAD = {
    "not json": ("{", "not JSON"),
    "a missing image": ({"question": "?", "image": "none.png"}, "no such image file"),
    "an unknown metric": ({"question": "?", "metric": "bleu"}, "its metric is 'bleu', expected one of exact"),
    "too few people": ({"question": "?", "metric": "vqa", "answers": ["a"]}, "at least 4; it has 1"),
    "no box to find": ({"question": "?", "metric": "iou", "answers": ["a"]}, "holds no box"),
    "a blank reference of an error rate": ({"question": "?", "metric": "cer", "answers": ["\u3000", " "]}, "is blank"),
    "blanks for words": ({"question": "?", "metric": "wer", "answer": "\n\t "}, "is blank"),
    "half a pair in the question": ({"question": "\ud83d?"}, "half a surrogate pair (U+D83D)"),
    "half a pair in the answer": ({"question": "?", "answers": ["x", "\udc00"]}, "half a surrogate pair (U+DC00)"),
    "half a pair in a field": ({"question": "?", "id": "\udfff"}, "half a surrogate pair (U+DFFF)"),
    "half a pair in a path": ({"question": "?", "image": "\ud800.png"}, "half a surrogate pair (U+D800)"),
    "half a pair in a name": ({"question": "?", "\ud800": 1}, "half a surrogate pair (U+D800)"),
    "an answer that is no choice": ({"question": "?", "A": "cat", "B": "dog", "answer": "cow"},
                                    "its answer 'cow' is none of its choices A, B"),
    "a letter without a choice": ({"question": "?", "A": "cat", "B": "dog", "answer": "C"}, "none of its choices A, B"),
    "no letter at all": ({"question": "?", "metric": "choice", "answer": "cow"}, "is none of its choices A, B, C"),
    "an image too many": ({"question": "<image><image>", "image": "0.png"}, "has 2 <image>, the row 1 images"),
}


@pytest.mark.parametrize("record, reason", BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_reported_by_file_and_line(read, questions_file: Path, record: object, reason: str) -> None:
    path = write_questions(questions_file.parent / "bad.jsonl", QUESTIONS[0], "", record)
    with pytest.raises(VL2Error, match="1 of 2 rows") as caught:
        read(path)
    assert f"{path}:3: " in caught.value.message and reason in caught.value.message
    found = read(path, tolerate=0.5)
    assert len(found.questions) == 1 and [row.source for row in found.bad_rows] == [f"{path}:3"]


def test_data_of_no_known_format_are_refused(read, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(VL2Error, match="the ending '.csv' is unknown"):
        read(tmp_path / "a.csv")
    with pytest.raises(VL2Error, match="no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(VL2Error, match="none of 0 rows"):
        read(write_questions(tmp_path / "empty.jsonl"))


def test_half_a_surrogate_pair_is_a_bad_row_in_every_format(read, questions_file: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "\ud800"}]
    records = [{"conversations": turns}, {"conversations": turns[:1]}]
    (questions_file.parent / "half.json").write_text(json.dumps(records))
    image = base64.b64encode((questions_file.parent / "0.png").read_bytes()).decode()
    (questions_file.parent / "half.tsv").write_text(
        f"index\timage\tquestion\tanswer\n1\t{image}\tWhat?\t['\\ud800']\n2\t{image}\tWhat?\t['x']\n")
    for name in ("half.json", "half.tsv"):
        path = questions_file.parent / name
        with pytest.raises(VL2Error, match="1 of 2 rows") as caught:
            read(path)
        assert "half a surrogate pair (U+D800)" in caught.value.message and f"{path}:" in caught.value.message
        assert len(read(path, tolerate=0.5).questions) == 1


@pytest.mark.parametrize("answer, expected", [
    ("J", "J"), ("(j)", "J"), ("kind 9", "J"), ("Kind  9", "J"), ("The answer is J.", "J"), ("kind A", "B")])
def test_the_answer_of_a_choice_is_a_letter_of_its_own_columns(
    read, questions_file: Path, answer: str, expected: str
) -> None:
    """Ten columns; a text that names another choice's letter is its own choice's all the same."""
    columns = {letter: f"kind {index}" for index, letter in enumerate("ABCDEFGHIJ")} | {"B": "kind A"}
    path = write_questions(questions_file.parent / "choices.jsonl", {"question": "?", "answer": answer, **columns})
    question, = read(path).questions
    assert (question.metric, question.answers, question.letters) == ("choice", (expected,), "ABCDEFGHIJ")
    assert question.score(f"It is {expected}.").value == 1 and question.score("It is C.").value == 0


def test_a_letter_that_cannot_be_chosen_is_no_answer(read, questions_file: Path) -> None:
    path = write_questions(questions_file.parent / "few.jsonl",
                           {"question": "?", "answer": "B", "A": "cat", "B": "dog", "C": "cow"},
                           {"question": "A: cat B: dog?", "metric": "choice", "answer": "B"},
                           {"question": "As listed?", "metric": "choice", "answer": "K"})
    few, listed, more = read(path).questions
    assert (few.letters, listed.letters, more.letters) == ("ABC", "ABCDEFGH", "ABCDEFGHIJK")
    assert few.score("I think B").value == listed.score("I think B").value == 1
    assert few.score("D, not B").value == 1 and listed.score("D, not B").value == 0

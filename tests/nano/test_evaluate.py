import pytest

from vl2.errors import VL2Error
from vl2.nano.evaluate import evaluate, is_right, score


def line(answer: str, task: str = "ocr", boxes=()) -> dict:
    return {"image": "a.png", "task": task, "question": "?", "answer": answer, "boxes": list(boxes)}


def located(label: str, box: tuple[int, ...]) -> str:
    return f"<|ref|>{label}<|/ref|><|det|>[{list(box)}]<|/det|>"


def test_text_answers_count_only_when_equal():
    assert is_right(line("3.50"), "3.50")
    assert not is_right(line("3.50"), "3.5")


def test_location_answers_count_by_label_and_overlap():
    expected = line(located("Milk", (100, 100, 300, 200)), "grounding", [(100, 100, 300, 200)])
    assert is_right(expected, located("Milk", (110, 105, 300, 205)))
    assert not is_right(expected, located("Milk", (400, 100, 600, 200)))
    assert not is_right(expected, located("Mlik", (100, 100, 300, 200)))
    assert not is_right(expected, "no box at all")


def test_score_counts_by_task_and_lists_what_was_wrong():
    answers = {"a.png": "x"}
    table, wrong = score([line("x"), line("y", "table")], lambda image, question: answers[image])
    assert table["ocr"] == {"right": 1, "asked": 1, "accuracy": 1.0}
    assert table["all"]["accuracy"] == 0.5
    assert [entry["given"] for entry in wrong] == ["x"]


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(VL2Error, match="nowhere"):
        evaluate(tmp_path / "nowhere", tmp_path / "heldout.jsonl")
    with pytest.raises(VL2Error, match=r"heldout\.jsonl"):
        from vl2.nano.evaluate import read_questions

        read_questions(tmp_path / "heldout.jsonl")

"""The figures of a report from positions and answers that are small enough to work out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from vl2.accuracy.answers import answer_figures
from vl2.accuracy.comparison import Positions
from vl2.accuracy.questions import Question
from vl2.accuracy.summary import logit_figures
from vl2.accuracy.tasks import task_figures
from vl2.accuracy.walk import ANSWER, TEXT, Reply
from vl2.data.sample import Sample


def columns(kind: list, kld: list, p: list, q: list, cluster: list) -> Positions:
    log_p, log_q = np.log(np.array(p, float)), np.log(np.array(q, float))
    return Positions(np.array(kind), np.array(kld, float), np.array(kld, float) + 0.5, log_p >= log_q, log_p, log_q,
                     np.array(cluster), np.array(cluster))


def test_logit_figures_worked_out_by_hand() -> None:
    positions = columns([ANSWER] * 4 + [TEXT], [0, 0.1, 0.2, 0.5, 9], [1, 0.5, 0.5, 0.5, 0.1], [1, 0.4, 0.25, 0.6, 0.1],
                        [0, 1, 2, 3, 3])
    found = logit_figures(positions, ANSWER)
    assert found["positions"] == 4 and found["images"] == 4
    kld = found["kld"]
    assert (kld["mean"], kld["median"], kld["max"]) == (pytest.approx(0.2), pytest.approx(0.15), 0.5)
    assert kld["mean_at_most"] == pytest.approx(0.7)
    # Deviations −0.2, −0.1, 0, 0.3: variance 0.14 / 3, over four positions.
    assert kld["se"] == pytest.approx(math.sqrt(0.14 / 3 / 4))
    assert found["same_top1_percent"]["mean"] == 75
    assert found["rms_delta_p_percent"] == pytest.approx(100 * math.sqrt((0.1 ** 2 + 0.25 ** 2 + 0.1 ** 2) / 4))
    assert found["mean_delta_p_percent"] == pytest.approx(100 * (-0.1 - 0.25 + 0.1) / 4)
    perplexity = found["perplexity"]
    assert perplexity["reference"] == pytest.approx((1 / 0.125) ** 0.25)
    assert perplexity["ratio"] == pytest.approx(perplexity["candidate"] / perplexity["reference"])
    ratios = np.log([1, 0.5 / 0.4, 2, 0.5 / 0.6])
    assert perplexity["ln_ratio_se"] == pytest.approx(ratios.std(ddof=1) / 2)
    assert logit_figures(positions, TEXT)["kld"]["se"] is None


def test_a_kind_without_positions_has_no_figures() -> None:
    assert logit_figures(columns([ANSWER], [0], [1], [1], [0]), TEXT) is None


def question(task: str, metric: str, answer: str, image: str) -> Question:
    return Question(Sample((), "f:1"), "", task, metric, (answer,) if answer else (), "", image)


def compared(*rows: tuple) -> SimpleNamespace:
    """Rows of (task, metric, right answer, image, reference's answer, candidate's answer)."""
    replies = tuple(tuple(Reply(tuple(text.encode()), text, "eos") for text in row[4:]) for row in rows)
    return SimpleNamespace(data=SimpleNamespace(questions=[question(*row[:4]) for row in rows]), replies=replies)


def test_task_figures_worked_out_by_hand() -> None:
    tasks, overall = task_figures(compared(
        ("a", "exact", "x", "0", "x", "x"), ("a", "exact", "x", "1", "x", "y"), ("a", "exact", "x", "2", "x", "x"),
        ("a", "exact", "x", "2", "y", "x"), ("a", "exact", "x", "3", "x", "y"),
        ("b", "cer", "abcd", "4", "abcd", "abxd"), ("b", "cer", "ab", "5", "ab", "ab"),
        ("a", "exact", "", "6", "p", "q")))
    exact, cer = tasks
    assert (exact["questions"], exact["images"]) == (5, 4)
    assert (exact["reference_percent"], exact["candidate_percent"]) == (pytest.approx(80), pytest.approx(60))
    assert exact["recovery_percent"] == pytest.approx(75) and exact["difference_points"] == pytest.approx(-20)
    assert exact["mcnemar"] == {"lost": 2, "gained": 1, "p": 1.0}
    assert exact["difference_95"][0] < -20 < exact["difference_95"][1]
    # One of six characters is wrong; the row is no longer free of errors.
    assert cer["candidate_percent"] == pytest.approx(100 * 5 / 6) and cer["mcnemar"]["lost"] == 1
    assert overall["questions"] == 7 and overall["mcnemar"]["lost"] == 3
    assert overall["mean_recovery_percent"] == pytest.approx((75 + 500 / 6) / 2)
    assert overall["worst_recovery_percent"] == pytest.approx(75)


def test_a_task_that_the_reference_cannot_do_has_no_recovery() -> None:
    tasks, overall = task_figures(compared(("a", "exact", "x", "0", "y", "x"), ("a", "exact", "x", "1", "y", "y")))
    assert tasks[0]["recovery_percent"] is None and overall["mean_recovery_percent"] is None


def test_references_without_a_character_do_not_break_the_report() -> None:
    (task,), _ = task_figures(compared(("a", "cer", " ", "0", "x", ""), ("a", "cer", "\u3000", "1", "", "y")))
    assert task["difference_points"] == 0 and task["difference_95"] == [0, 0] and task["recovery_percent"] is None


def test_rows_without_answers_give_no_task() -> None:
    assert task_figures(compared(("a", "exact", "", "0", "y", "x"))) == ([], None)


def test_answers_that_differ_are_counted_by_tokens_and_by_text() -> None:
    found = answer_figures(compared(("a", "exact", "x", "0", "Yes", "yes"), ("a", "exact", "x", "1", "ab", "ab"),
                                    ("a", "exact", "x", "2", "ab", "abcd"), ("a", "exact", "x", "3", "x", "y" * 9)))
    assert found["equal_percent"] == 25 and found["equal_normalised_percent"] == 50
    assert found["similarity_percent"] == pytest.approx(100 * (2 / 3 + 1 + 0.5 + 0) / 4)
    assert (found["reference_loop_percent"], found["candidate_loop_percent"]) == (0, 25)
    assert found["length_ratio"] == pytest.approx((3 + 2 + 4 + 9) / (3 + 2 + 2 + 1))

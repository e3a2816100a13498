"""A whole comparison: figures, files, bounds and exit codes, interruption."""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.accuracy.conftest import write_questions
from vl2 import __version__
from vl2.accuracy import comparison as comparison_module
from vl2.accuracy.answers import ends_in_a_loop
from vl2.accuracy.bounds import Bounds, check_bounds
from vl2.accuracy.compare import CompareOptions, Surroundings, compare
from vl2.accuracy.comparison import run_along
from vl2.accuracy.metrics import METRICS
from vl2.accuracy.questions import DataOptions, read_questions
from vl2.accuracy.record import OpenBundle, RecordOptions, record
from vl2.accuracy.recording import Recording
from vl2.accuracy.report import to_markdown
from vl2.accuracy.walk import WalkOptions
from vl2.cli import cli, run_command
from vl2.cli.evaluation import METRIC_NAMES
from vl2.errors import VL2Error
from vl2.runtime import GenerationOptions

RECORD = RecordOptions(WalkOptions(max_new_tokens=8), top=640)
OPTIONS = CompareOptions(record=RECORD)


@pytest.fixture(scope="module")
def recording(reference: OpenBundle, questions_file: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings") / "r"
    data = read_questions(questions_file, reference.model.engine.processor, DataOptions())
    return record(reference, data, folder, RECORD).folder


@pytest.fixture(scope="module")
def report(recording: Path, candidate_bundle: Path, questions_file: Path) -> dict:
    return compare(recording, candidate_bundle, questions_file, OPTIONS)


def test_a_bundle_has_lost_nothing_against_itself(reference_bundle: Path, questions_file: Path) -> None:
    report = compare(reference_bundle, reference_bundle, questions_file, OPTIONS)
    answer = report["logits"]["answer"]
    assert answer["kld"]["max"] == answer["kld"]["mean_at_most"] == answer["rms_delta_p_percent"] == 0
    assert answer["perplexity"]["ratio"] == 1 and answer["same_top1_percent"]["mean"] == 100
    assert report["answers"]["equal_percent"] == report["answers"]["similarity_percent"] == 100
    assert report["worst_questions"] == [] and report["overall"]["mcnemar"]["lost"] == 0


def test_another_bundle_has_lost_what_its_logits_say(report: dict) -> None:
    answer = report["logits"]["answer"]
    assert 0 < answer["kld"]["median"] <= answer["kld"]["p90"] <= answer["kld"]["p99_9"] <= answer["kld"]["max"]
    assert answer["kld"]["mean"] == answer["kld"]["mean_at_most"] and answer["kld"]["se"] > 0
    assert answer["same_top1_percent"]["mean"] < 100 and answer["positions"] == 40
    # The reference's tokens are its own choice, so another model finds them less likely on average.
    assert answer["perplexity"]["ratio"] > 1
    assert report["logits"]["text"] is None and "text positions" in report["not_measured"][0]
    klds = [row["kld"] for row in report["worst_questions"]]
    assert klds == sorted(klds, reverse=True) and len(klds) == 5


def test_fewer_tokens_enclose_what_all_of_them_give(
    report: dict, reference_bundle: Path, candidate_bundle: Path, questions_file: Path
) -> None:
    options = replace(OPTIONS, record=replace(RECORD, top=20))
    coarse = compare(reference_bundle, candidate_bundle, questions_file, options)["logits"]["answer"]["kld"]
    assert coarse["mean"] < report["logits"]["answer"]["kld"]["mean"] < coarse["mean_at_most"]


def test_text_positions_are_measured_when_they_are_asked_for(
    reference_bundle: Path, candidate_bundle: Path, questions_file: Path
) -> None:
    options = CompareOptions(record=RecordOptions(WalkOptions(max_new_tokens=2, prompt_text=True), 640))
    report = compare(reference_bundle, candidate_bundle, questions_file, options)
    assert report["logits"]["text"]["positions"] > 20 and report["logits"]["text"]["kld"]["mean"] > 0
    assert not any("text" in line for line in report["not_measured"])


def test_tasks_come_with_their_metric_and_rows_without_answers_are_left_out(report: dict) -> None:
    assert [(task["task"], task["metric"], task["questions"]) for task in report["tasks"]] == [
        ("ocr", "exact match", 2), ("boxes", "box IoU ≥ 0.5", 1), ("questions", "ANLS", 1)]
    assert report["overall"]["questions"] == 4 and report["answers"]["questions"] == 5
    assert "candidate_valid_percent" in report["tasks"][1]


def test_the_files_of_a_report(
    reference: OpenBundle, candidate: OpenBundle, recording: Path, questions_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    report = compare(recording, candidate.folder, questions_file, replace(OPTIONS, out=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "http" not in re.sub(r"base64,[^\"]*", "", page)
    markdown = (tmp_path / "out" / "report.md").read_text()
    for title in ("Distributions", "Tasks", "Answers", "Where it was lost: questions", "What was compared"):
        assert f"## {title}\n" in markdown and f"<h2>{title}</h2>" in page
    rows = predictions(tmp_path / "out" / "predictions.tsv")
    assert rows[4]["prediction"] == candidate.model.ask("Two and two?", options=GenerationOptions(8)).text
    expected = reference.model.ask("Two and two?", options=GenerationOptions(8)).text
    assert predictions(tmp_path / "out" / "reference_predictions.tsv")[4]["prediction"] == expected
    assert [row["index"] for row in rows] == list("abcde") and rows[0]["answer"] == "['x', 'y']"
    assert rows[3]["question"] == "Compare  with ."
    assert all(row["prediction"] for row in rows)
    assert not list(tmp_path.glob(".*"))


def predictions(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_without_matplotlib_the_page_has_tables_and_says_so(
    recording: Path, candidate_bundle: Path, questions_file: Path, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    compare(recording, candidate_bundle, questions_file, replace(OPTIONS, out=tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "matplotlib is not installed" in page and "<img" not in page and "<h2>Tasks</h2>" in page


def test_text_from_a_model_cannot_become_markup(
    reference_bundle: Path, questions_file: Path, candidate_bundle: Path, tmp_path
) -> None:
    row = {"question": "Which?", "task": "<script>|x", "answer": "<b>&|"}
    path = write_questions(questions_file.parent / "markup.jsonl", row)
    compare(reference_bundle, candidate_bundle, path, replace(OPTIONS, out=tmp_path / "out"))
    assert "<script>" not in (tmp_path / "out" / "report.html").read_text()
    assert "\\<script>\\|x" in (tmp_path / "out" / "report.md").read_text()


def test_an_interrupted_comparison_goes_on_and_gives_the_same(
    report: dict, recording: Path, candidate_bundle: Path, questions_file: Path, tmp_path, monkeypatch
) -> None:
    real, asked = comparison_module.walk_of, []

    def interrupted(context, bundle, question, options):
        asked.append(question.id)
        if asked == list("abc"):
            raise KeyboardInterrupt
        return real(context, bundle, question, options)

    monkeypatch.setattr(comparison_module, "walk_of", interrupted)
    options = replace(OPTIONS, out=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        compare(recording, candidate_bundle, questions_file, options)
    assert not (tmp_path / "out").exists()
    again = compare(recording, candidate_bundle, questions_file, options)
    assert asked == list("abc") + list("cde")
    kld, whole = (found["logits"]["answer"]["kld"] for found in (again, report))
    assert kld["mean"] == pytest.approx(whole["mean"], rel=1e-3)
    assert {**again["answers"]} == report["answers"] and again["tasks"] == report["tasks"]


def test_two_comparisons_do_not_write_to_one_place(
    recording: Path, candidate_bundle: Path, questions_file: Path, tmp_path
) -> None:
    options = replace(OPTIONS, out=tmp_path / "out")

    def again(done: int, total: int) -> None:
        with pytest.raises(VL2Error, match="another comparison writes to"):
            compare(recording, candidate_bundle, questions_file, options)

    compare(recording, candidate_bundle, questions_file, options, Surroundings(progress=lambda stage: again))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_backend_belongs_to_a_comparison(
    recording: Path, candidate: OpenBundle, questions_file: Path, tmp_path
) -> None:
    data = read_questions(questions_file, candidate.model.engine.processor, DataOptions())
    _, journal = run_along(Recording(recording), candidate, data, tmp_path / "out")
    found = json.loads((journal.folder / "job.json").read_text())
    assert found["backend"].startswith("CPU, onnxruntime ") and found["vl2"] == __version__


def test_a_reference_bundle_is_recorded_into_the_report(
    reference_bundle: Path, candidate_bundle: Path, questions_file: Path, tmp_path
) -> None:
    options = replace(OPTIONS, out=tmp_path / "out")
    first = compare(reference_bundle, candidate_bundle, questions_file, options)
    again = compare(tmp_path / "out" / "reference", candidate_bundle, questions_file)
    assert again["logits"] == first["logits"]
    with pytest.raises(VL2Error, match="exists"):
        compare(reference_bundle, candidate_bundle, questions_file, options)
    compare(reference_bundle, candidate_bundle, questions_file, replace(options, force=True))
    assert (tmp_path / "out" / "reference" / "recording.json").is_file()


def test_a_noise_floor_stands_beside_the_loss(
    report: dict, recording: Path, reference_bundle: Path, candidate_bundle: Path, questions_file: Path, tmp_path
) -> None:
    options = replace(OPTIONS, floor=reference_bundle, out=tmp_path / "out")
    found = compare(recording, candidate_bundle, questions_file, options)
    answer = found["floor"]["logits"]["answer"]
    assert answer["kld"]["max"] == 0 and answer["positions"] == found["logits"]["answer"]["positions"]
    assert found["logits"] == report["logits"], "the floor changes nothing else"
    assert "| answer, noise floor | 40 | 0 ± 0 |" in to_markdown(found) and report["floor"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # The candidate as its own floor: what it loses is all noise.
    itself = compare(recording, candidate_bundle, questions_file, replace(OPTIONS, floor=candidate_bundle))
    assert itself["floor"]["logits"] == itself["logits"]


def test_what_is_no_reference_is_refused(candidate_bundle: Path, questions_file: Path, tmp_path) -> None:
    with pytest.raises(VL2Error, match="neither a bundle nor a recording"):
        compare(tmp_path, candidate_bundle, questions_file)


def test_a_bundle_of_other_tokens_is_refused(recording: Path, nano_bundle: Path, questions_file: Path) -> None:
    with pytest.raises(VL2Error, match="has vocab_size 384, the reference .* 640"):
        compare(recording, nano_bundle, questions_file, OPTIONS)


def test_a_report_tells_how_a_bundle_was_quantized(report: dict) -> None:
    facts = {**report["candidate"], "lowering": "ort", "quantization": {"method": "gptq"}}
    page = to_markdown({**report, "candidate": facts})
    assert "| lowering | portable | ort |" in page and "| quantized by | – | gptq |" in page


def test_the_command_line_knows_every_metric() -> None:
    assert set(METRIC_NAMES) == METRICS.keys()


def vl2(*arguments: object) -> int:
    return run_command(cli, "vl2", list(map(str, arguments)))


def test_the_exit_code_tells_whether_the_bounds_hold(
    report: dict, recording: Path, candidate_bundle: Path, questions_file: Path, capsys
) -> None:
    base = ("compare", recording, candidate_bundle, "--data", questions_file)
    kld = report["logits"]["answer"]["kld"]["mean"]
    assert vl2(*base, "--max-kld", kld * 1.01, "--json") == 0
    assert json.loads(capsys.readouterr().out)["bounds"][0]["holds"] is True
    assert vl2(*base, "--max-kld", kld * 0.99) == 1
    captured = capsys.readouterr()
    assert "outside --max-kld" in captured.err and "| BROKEN |" in captured.out
    assert vl2(*base) == 0
    assert vl2("compare", recording, candidate_bundle) == 2
    assert vl2(*base, "--top", 9) == 2
    assert "--top was decided" in capsys.readouterr().err
    assert vl2("compare", recording, candidate_bundle, "--data", "none.jsonl") == 1


def test_recording_on_the_command_line(reference_bundle: Path, questions_file: Path, tmp_path, capsys) -> None:
    arguments = ("record", reference_bundle, "--data", questions_file, "--out", tmp_path / "r", "--max-new-tokens", 4,
                 "--limit", 2)
    assert vl2(*arguments, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == 2 and facts["max_new_tokens"] == 4 and facts["top"] == 640
    assert vl2(*arguments) == 1 and "exists" in capsys.readouterr().err
    assert vl2("compare", tmp_path / "r", reference_bundle, "--data", questions_file, "--limit", 2, "--max-kld", 0) == 0


def fake_report(recoveries: list[float | None], kld: tuple[float, float] = (0.001, 0.001)) -> dict:
    return {"logits": {"answer": {"kld": {"mean": kld[0], "mean_at_most": kld[1]}}},
            "tasks": [{"task": f"t{i}", "recovery_percent": value} for i, value in enumerate(recoveries)]}


def test_the_worst_task_decides_the_recovery() -> None:
    check, = check_bounds(fake_report([100.0, 97.2, None]), Bounds(min_recovery=98))
    assert (check.holds, check.found) == (False, 97.2) and "t1" in check.detail and "1 where" in check.detail
    assert "mean 98.60 %" in check.detail
    assert check_bounds(fake_report([98.0, 101.0]), Bounds(min_recovery=98))[0].holds
    untold, = check_bounds(fake_report([None]), Bounds(min_recovery=98))
    assert not untold.holds and untold.found is None


def test_a_recovery_that_no_row_could_show_is_refused_before_the_work(
    reference_bundle: Path, candidate_bundle: Path, questions_file: Path
) -> None:
    path = write_questions(questions_file.parent / "unanswered.jsonl", {"question": "Two?"})
    worked = []
    surroundings = Surroundings(progress=lambda stage: lambda done, total: worked.append(stage))
    with pytest.raises(VL2Error, match="has an answer to score against"):
        compare(reference_bundle, candidate_bundle, path, replace(OPTIONS, bounds=Bounds(min_recovery=9)), surroundings)
    assert worked == []


def test_a_loss_that_the_recording_cannot_rule_out_is_not_passed() -> None:
    check, = check_bounds(fake_report([], (0.001, 0.02)), Bounds(max_kld=0.01))
    assert not check.holds and "larger --top" in check.detail


@pytest.mark.parametrize("ids, expected", [
    ([1] * 8, True), ([1] * 7, False), ([9, 1, 2] * 8, True), ([5, 6] + [1, 2] * 8, True), ([1, 2] * 8 + [3], False),
    ([], False), (list(np.arange(100)), False),
])
def test_a_loop_is_an_ngram_repeated_eight_times_at_the_end(ids: list[int], expected: bool) -> None:
    assert ends_in_a_loop(ids) is expected

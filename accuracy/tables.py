"""The tables of a report: the same rows for the terminal, Markdown and HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vl2.accuracy.layers import layer_tables
from vl2.accuracy.table import NOTHING, Table, number, with_error


def tables_of(report: dict[str, Any]) -> list[Table]:
    """Every table of a report, in reading order."""
    layers = layer_tables(report["layers"]) if report["layers"] else []
    found = [_bounds(report), _logits(report), _tasks(report), _answers(report), _worst(report), *layers,
             _facts(report)]
    return [table for table in found if table.rows]


def _bounds(report: dict[str, Any]) -> Table:
    rows = tuple((check["bound"], number(check["limit"]), number(check["found"]),
                  "holds" if check["holds"] else "BROKEN", check["detail"]) for check in report["bounds"])
    return Table("Bounds", ("bound", "limit", "found", "", ""), rows)


def _logits(report: dict[str, Any]) -> Table:
    header = ("positions", "count", "KLD mean ± SE", "median", "90 %", "99 %", "99.9 %", "max", "same top-1",
              "RMS Δp", "perplexity ratio ± SE")
    rows = [_distribution(name, figures) for name, figures in report["logits"].items() if figures is not None]
    floor = report["floor"]
    if floor is not None:
        rows += [_distribution(f"{name}, noise floor", figures) for name, figures in floor["logits"].items()
                 if figures is not None]
    notes = ["KLD in nats, along the reference's own answers; standard errors are clustered by image."]
    if floor is not None:
        notes.append(f"Noise floor: the same weights as {Path(floor['bundle']['path']).name} "
                     f"({floor['bundle']['scheme']}) stores them. A loss of that size is none.")
    answer = report["logits"]["answer"]
    if not report["options"]["exact"]:
        notes.append(f"Of each position the {report['options']['top']} likeliest tokens were recorded: the mean KLD is "
                     f"at least what stands here and at most {number(answer['kld']['mean_at_most'])}.")
    if report["not_measured"]:
        notes.append("Not measured: " + "; ".join(report["not_measured"]) + ".")
    return Table("Distributions", header, tuple(rows), " ".join(notes))


def _distribution(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    kld, agreement, perplexity = figures["kld"], figures["same_top1_percent"], figures["perplexity"]
    return (name, str(figures["positions"]), with_error(kld["mean"], kld["se"]),
            *(number(kld[key]) for key in ("median", "p90", "p99", "p99_9", "max")),
            with_error(agreement["mean"], agreement["se"], " %"), f"{figures['rms_delta_p_percent']:.2f} %",
            with_error(perplexity["ratio"], perplexity["ratio_se"], digits=5))


def _tasks(report: dict[str, Any]) -> Table:
    header = ("task", "metric", "questions", "images", "reference", "candidate", "difference [95 %]", "recovery",
              "lost / gained", "McNemar p", "would have shown")
    overall = [{"task": "all", **report["overall"]}] if report["overall"] else []
    rows = tuple((
        task["task"], task["metric"], str(task["questions"]), str(task["images"]),
        _percent(task["reference_percent"]), _percent(task["candidate_percent"]),
        f"{task['difference_points']:+.2f} [{task['difference_95'][0]:+.2f}, {task['difference_95'][1]:+.2f}]",
        _percent(task["recovery_percent"]), f"{task['mcnemar']['lost']} / {task['mcnemar']['gained']}",
        number(task["mcnemar"]["p"]), f"{task['smallest_visible_points']:.1f} points",
    ) for task in [*report["tasks"], *overall])
    note = ("Differences in points, candidate − reference, with the interval of 10,000 paired resamples of images. A "
            "change smaller than the last column would probably have gone unseen, so none seen is not none proved.")
    valid = [f"{task['task']}: {task['reference_valid_percent']:.1f} % of the reference's answers are valid boxes, "
             f"{task['candidate_valid_percent']:.1f} % of the candidate's"
             for task in report["tasks"] if "reference_valid_percent" in task]
    means = [f"Mean recovery of the tasks: {_percent(row['mean_recovery_percent'])}." for row in overall]
    return Table("Tasks", header, rows, " ".join([note, *means, *(f"{line}." for line in valid)]))


def _answers(report: dict[str, Any]) -> Table:
    answers = report["answers"]
    ratio = answers["length_ratio"]
    rows = (("the same tokens", NOTHING, _percent(answers["equal_percent"])),
            ("the same text but for case and blanks", NOTHING, _percent(answers["equal_normalised_percent"])),
            ("mean edit similarity", NOTHING, _percent(answers["similarity_percent"])),
            ("loops or token limit", _percent(answers["reference_loop_percent"]),
             _percent(answers["candidate_loop_percent"])),
            ("tokens", str(answers["reference_tokens"]), str(answers["candidate_tokens"])
             + (f" (× {ratio:.3f})" if ratio is not None else "")))
    return Table("Answers", ("", "reference", "candidate"), rows,
                 "A loop is an answer at the token limit, or one that ends in an n-gram repeated eight times.")


def _worst(report: dict[str, Any]) -> Table:
    rows = tuple((row["source"], row["task"], number(row["kld"]), row["expected"], row["reference"], row["candidate"])
                 for row in report["worst_questions"])
    header = ("row", "task", "mean KLD", "expected", "reference", "candidate")
    return Table("Where it was lost: questions", header, rows, "The questions with the largest mean KLD, worst first.")


def _facts(report: dict[str, Any]) -> Table:
    sides = report["reference"], report["candidate"]
    rows = [(name, *(str(side[key]) for side in sides)) for name, key in
            (("bundle", "path"), ("variant", "variant"), ("scheme", "scheme"), ("lowering", "lowering"),
             ("source", "source"), ("manifest sha256", "manifest_sha256"), ("ran on", "backend"))]
    rows.append(("size", *(f"{side['size_bytes'] / 1e9:.3f} GB" for side in sides)))
    methods = [(side["quantization"] or {}).get("method", NOTHING) for side in sides]
    if any(method != NOTHING for method in methods):
        rows.append(("quantized by", *methods))
    data = report["data"]
    note = (f"Data: {data['path']} ({data['format']}), {data['questions']} questions on {data['images']} images, "
            f"{len(data['bad_rows'])} of {data['rows']} rows bad, sha256 {data['sha256']}. Answers of at most "
            f"{report['options']['max_new_tokens']} tokens. Written by vl2 {report['vl2_version']} in "
            f"{report['seconds']} s.")
    bad = "".join(f" Bad row {row}." for row in data["bad_rows"])
    return Table("What was compared", ("", "reference", "candidate"), tuple(rows), note + bad)


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f} %"

"""Writes a comparison as files: JSON, Markdown, one HTML page, and predictions as VLMEvalKit tables."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vl2.accuracy.comparison import Comparison
from vl2.accuracy.questions import Question
from vl2.accuracy.table import Table
from vl2.accuracy.tables import tables_of

REPORT_NAME = "report.json"
_NO_PLOTS = "matplotlib is not installed, so this page has no plots: pip install '.[report]' in vl2's folder."
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: left; overflow-wrap: break-word; }
th { background: #f4f4f4; white-space: nowrap; }
p { max-width: 60rem; } img { max-width: 100%; }
.BROKEN { color: #b00020; font-weight: bold; }
"""


def write_report(folder: Path, report: dict[str, Any], comparison: Comparison) -> list[str]:
    """Writes every file of the report into `folder`; gives what could not be shown, for the user to know."""
    from vl2.accuracy.plots import draw_plots

    plots = draw_plots(comparison, report)
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(to_html(report, plots), encoding="utf-8")
    for side, name in enumerate(("reference_predictions.tsv", "predictions.tsv")):
        write_predictions(folder / name, comparison.data.questions, [pair[side].text for pair in comparison.replies])
    return [] if plots is not None else [_NO_PLOTS]


def title_of(report: dict[str, Any]) -> str:
    """One line that says what was compared."""
    reference, candidate = report["reference"], report["candidate"]
    return (f"{Path(candidate['path']).name} ({candidate['scheme']}) against {Path(reference['path']).name} "
            f"({reference['scheme']})")


def to_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    return markdown_page(title_of(report), tables_of(report))


def markdown_page(title: str, tables: Sequence[Table]) -> str:
    """Tables under a title."""
    return f"# {title}\n" + "".join(_markdown_table(table) for table in tables)


def _markdown_table(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    rows = "".join("| " + " | ".join(_markdown_cell(cell) for cell in line) + " |\n" for line in lines)
    return f"\n## {table.title}\n\n{rows}" + (f"\n{table.note}\n" if table.note else "")


def _markdown_cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "\\<")


def to_html(report: dict[str, Any], plots: Sequence[tuple[str, str]] | None) -> str:
    """One page that needs no other file. plots: (caption, base64 of a PNG), None where they could not be drawn."""
    title = html.escape(title_of(report))
    images = "".join(f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
                     f"<figcaption>{html.escape(caption)}</figcaption></figure>\n" for caption, data in plots or ())
    missing = f"<p>{_NO_PLOTS}</p>\n" if plots is None else ""
    head, *rest = (_html_table(table) for table in tables_of(report))
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{head}{missing}{images}{''.join(rest)}"
            "</body>\n</html>\n")


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = "".join("<tr>" + "".join(_html_cell(cell) for cell in row) + "</tr>\n" for row in table.rows)
    note = f"<p>{html.escape(table.note)}</p>\n" if table.note else ""
    return f"<h2>{html.escape(table.title)}</h2>\n<table>\n<tr>{head}</tr>\n{rows}</table>\n{note}"


def _html_cell(text: str) -> str:
    return f"<td{' class=BROKEN' if text == 'BROKEN' else ''}>{html.escape(text)}</td>"


def write_predictions(path: Path, questions: Sequence[Question], texts: Sequence[str]) -> None:
    """A VLMEvalKit table of predictions: the row's own columns but the image, then `prediction`, to be scored there."""
    rows = [{**_columns(question, index), "prediction": text}
            for index, (question, text) in enumerate(zip(questions, texts, strict=True))]
    names = dict.fromkeys(name for row in rows for name in row if name != "prediction")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*names, "prediction"], delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _columns(question: Question, index: int) -> dict[str, str]:
    facts = question.sample.facts
    if "index" in facts and "question" in facts:  # the row came from such a table
        return {name: str(cell) for name, cell in facts.items()}
    text = question.sample.conversation[-2].content.replace("<image>", "").strip()
    answers = list(question.answers)
    return {"index": question.id or str(index), "question": text,
            "answer": answers[0] if len(answers) == 1 else repr(answers), "category": question.task}

"""Options of the verbs that ask an evaluation's questions, and what vl2.accuracy makes of them."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vl2.cli.options import Share
from vl2.cli.progress import WorkProgress

# The names of vl2.accuracy.metrics.METRICS, which help must not import; a test compares them.
METRIC_NAMES = ("exact", "choice", "anls", "relaxed", "vqa", "contains", "contains_formula", "cer", "wer", "iou")

_OPTIONS = (
    click.option("--data", type=click.Path(path_type=Path), required=True,
                 help="Questions: .jsonl, .tsv (VLMEvalKit) or .json (LLaVA)."),
    click.option("--limit", type=click.IntRange(min=1), help="Only the first so many rows."),
    click.option("--tolerate", type=Share(), default="5%", show_default=True,
                 help="Run nothing when more of the rows are bad."),
    click.option("--max-new-tokens", type=click.IntRange(min=1), help="Of an answer.  [default: 512]"),
    click.option("--top", type=click.IntRange(min=1),
                 help="Tokens recorded a position, 8 bytes each; the vocabulary's size makes the KLD exact.  "
                      "[default: 1024]"),
    click.option("--prompt-text", is_flag=True, help="Measure the prompt's text positions too, one step each."),
)


def evaluation_options(command: Callable) -> Callable:
    """Adds the options of asking an evaluation's questions to a verb; it receives them as keyword arguments."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def to_record_options(values: dict[str, Any], force: bool = False) -> Any:
    """RecordOptions; takes what it needs of `evaluation_options` out of `values`."""
    from vl2.accuracy.record import RecordOptions
    from vl2.accuracy.walk import WalkOptions

    given = {name: values.pop(name) for name in ("max_new_tokens", "prompt_text")}
    walk = WalkOptions(**{name: value for name, value in given.items() if value is not None})
    top = values.pop("top")
    return RecordOptions(walk, force=force) if top is None else RecordOptions(walk, top, force)


def to_data_options(values: dict[str, Any]) -> Any:
    """DataOptions of an evaluation; takes what it needs of `evaluation_options` out of `values`."""
    from vl2.accuracy.questions import DataOptions

    return DataOptions(values.pop("limit"), values.pop("metric", None), values.pop("tolerate"))


class RowProgress:
    """Callable `(done, total)`: how many questions are done and how long the rest will take, at this run's rate."""

    def __init__(self, stage: str):
        self._stage, self._show = stage, WorkProgress()
        self._start, self._first = time.monotonic(), None

    def __call__(self, done: int, total: int) -> None:
        if self._first is None:
            self._first = done
        new, elapsed = done - self._first, time.monotonic() - self._start
        self._show.tell(f"{self._stage}, {done} of {total} questions", done / total,
                        elapsed / new * (total - done) if new else None)
        if done == total:
            self._show.__exit__()

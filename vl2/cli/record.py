"""`vl2 record`: a reference bundle in, its answers and distributions out."""

import json
from pathlib import Path
from typing import Any

import click

from vl2.cli.evaluation import RowProgress, evaluation_options, to_data_options, to_record_options
from vl2.cli.options import bundle_options, debug_option, json_option, open_as_asked


@click.command("record")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The recording, a folder to write.")
@evaluation_options
@click.option("--force", is_flag=True, help="Replace an existing recording once the new one is whole.")
@bundle_options
@json_option
@debug_option
def command(bundle: Path, out: Path, force: bool, as_json: bool, **choices: Any) -> None:
    """Run the reference BUNDLE once, for `vl2 compare` where it does not fit.

    Holds the greedy answers and, for each of their positions, the likeliest tokens with their probabilities. An
    interrupted recording goes on at the next question.
    """
    from vl2.accuracy.questions import read_questions
    from vl2.accuracy.record import OpenBundle, record
    from vl2.json_file import to_json

    data, options = choices.pop("data"), to_record_options(choices, force)
    data_options = to_data_options(choices)
    opened = OpenBundle(bundle, open_as_asked(bundle, choices))
    questions = read_questions(data, opened.model.engine.processor, data_options)
    for row in questions.bad_rows:
        click.echo(f"bad row: {row}", err=True)
    facts = to_json(record(opened, questions, out, options, RowProgress("recording")).facts)
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else
               f"{out}: {facts['rows']} answers, {sum(facts['positions'].values())} positions, {facts['seconds']} s")

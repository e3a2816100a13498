"""`vl2 compare`: what a bundle lost against a reference."""

import json
from pathlib import Path
from typing import Any

import click

from vl2.cli.evaluation import METRIC_NAMES, RowProgress, evaluation_options, to_data_options, to_record_options
from vl2.cli.options import bundle_options, debug_option, json_option, open_as_asked


@click.command("compare")
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path),
              help="A folder for the report (HTML, Markdown, JSON) and the predictions (VLMEvalKit TSV).")
@click.option("--max-kld", type=click.FloatRange(min=0), help="Exit with 1 when the mean KLD of answers is above.")
@click.option("--min-recovery", type=click.FloatRange(min=0),
              help="Exit with 1 when any task keeps fewer per cent of REFERENCE's score; the mean is told too.")
@evaluation_options
@click.option("--metric", type=click.Choice(METRIC_NAMES),
              help="For rows that name none, instead of what their task suggests.")
@click.option("--calib", type=click.Path(path_type=Path),
              help="The calibration set of BUNDLE: questions on its images are refused.")
@click.option("--floor", type=click.Path(path_type=Path),
              help="A bundle of REFERENCE's weights stored otherwise, such as fp32 for fp16: what it loses is noise.")
@click.option("--layers", type=click.Path(path_type=Path),
              help="What `vl2 layers` wrote on BUNDLE's checkpoint, for the same report.")
@click.option("--force", is_flag=True, help="Replace an existing report once the new one is whole.")
@bundle_options
@json_option
@debug_option
def command(reference: Path, bundle: Path, as_json: bool, **choices: Any) -> int:
    """Tell what BUNDLE lost against REFERENCE, a bundle or a recording of one.

    BUNDLE walks along the reference's answers, then answers by itself. Exit code 1 outside a bound. With --out an
    interrupted comparison goes on at the next question.
    """
    from vl2.accuracy.bounds import Bounds
    from vl2.accuracy.compare import CompareOptions, Surroundings, compare
    from vl2.accuracy.report import to_markdown
    from vl2.accuracy.table import number

    _refuse_what_a_recording_decides(reference, choices)
    options = CompareOptions(choices.pop("out"), choices.pop("force"), to_data_options(choices),
                             to_record_options(choices), Bounds(choices.pop("max_kld"), choices.pop("min_recovery")),
                             choices.pop("calib"), choices.pop("layers"), choices.pop("floor"))
    data = choices.pop("data")
    surroundings = Surroundings(lambda folder: open_as_asked(folder, dict(choices)), RowProgress,
                                lambda message: click.echo(message, err=True))
    report = compare(reference, bundle, data, options, surroundings)
    click.echo(json.dumps(report, indent=2, ensure_ascii=False) if as_json else to_markdown(report), nl=as_json)
    broken = [check for check in report["bounds"] if not check["holds"]]
    for check in broken:
        found = f"{number(check['found'])} ({check['detail']})"
        click.echo(f"outside {check['bound']} {check['limit']:g}: {found}", err=True)
    return 1 if broken else 0


def _refuse_what_a_recording_decides(reference: Path, choices: dict[str, Any]) -> None:
    from vl2.accuracy.recording import RECORDING_NAME

    given = [name for name in ("max_new_tokens", "top", "prompt_text") if choices[name] not in (None, False)]
    if given and (reference / RECORDING_NAME).is_file():
        option = given[0].replace("_", "-")
        raise click.UsageError(f"--{option} was decided when {reference} was recorded; leave it out.")

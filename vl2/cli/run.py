"""`vl2 run`: one question to a bundle, the answer streamed."""

import json
from pathlib import Path
from typing import Any

import click

from vl2.cli.options import (
    bundle_options,
    cache_options,
    debug_option,
    generation_options,
    json_option,
    max_tiles_option,
    open_as_asked,
    to_generation_options,
)
from vl2.errors import VL2Error


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The question; <image> in it places the images.")
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path),
              help="An image file; may be given several times.")
@click.option("--draw", type=click.Path(path_type=Path), help="Write the last image with the answer's boxes here.")
@click.option("--top-logprobs", type=click.IntRange(min=0), help="With --json: the logarithm of each token's "
              "probability, and of so many likeliest tokens at its place.")
@generation_options
@max_tiles_option
@cache_options
@bundle_options
@json_option
@debug_option
def command(bundle: Path, prompt: str, images: tuple[Path, ...], draw: Path | None, as_json: bool,
            **choices: Any) -> None:
    """Answer one question about images from BUNDLE."""
    if draw is not None and not images:
        raise click.UsageError("--draw needs an --image to draw on.")
    if choices["top_logprobs"] is not None and not as_json:
        raise click.UsageError("--top-logprobs needs --json, which shows them.")
    options = to_generation_options(choices)
    model = open_as_asked(bundle, choices)
    answer = answer_streamed(model, prompt, images, options, echo=not as_json)
    if as_json:
        click.echo(json.dumps(answer.to_dict(), ensure_ascii=False))
    report_warnings(answer, options)
    if draw is not None:
        draw_boxes(answer, images, draw)


def answer_streamed(asker: Any, prompt: str, images: tuple[Path, ...], options: Any, echo: bool) -> Any:
    """The Answer of a bundle or a chat; its text goes to stdout piece by piece when `echo` is set."""
    stream = asker.stream(prompt, images=list(images), options=options)
    for piece in stream:
        if echo:
            click.echo(piece, nl=False)
    if echo:
        click.echo()
    return stream.answer


def report_warnings(answer: Any, options: Any) -> None:
    """Says on stderr what of the grounding output could not be read, and why an answer ended before its time."""
    for problem in answer.box_problems:
        click.echo(f"warning: {problem}", err=True)
    if answer.loop is not None:
        click.echo(f"warning: the answer was ended, {answer.loop}; --no-repetition-guard lets it go on", err=True)
    if options.constraint is not None and answer.stop_reason != "eos":
        click.echo(f"warning: the answer was cut after {len(answer.token_ids)} tokens and may lack the end of its form",
                   err=True)


def draw_boxes(answer: Any, images: tuple[Path, ...], target: Path) -> None:
    """Writes the last image with the boxes of the answer, which is the one the original draws them on."""
    from vl2.image import load_image
    from vl2.runtime.grounding import draw

    try:
        draw(load_image(images[-1]), answer.boxes).save(target)
    except (OSError, ValueError) as error:
        raise VL2Error(f"the drawn boxes cannot be written to `{target}`: {error}",
                       hint="give a file name that ends in .png or .jpg, in a folder that you may write to") from error
    click.echo(f"{len(answer.boxes)} boxes drawn: {target}", err=True)

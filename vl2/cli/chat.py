"""`vl2 chat`: a conversation with a bundle on the terminal."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from vl2.cli.options import (
    bundle_options,
    cache_options,
    debug_option,
    generation_options,
    max_tiles_option,
    open_as_asked,
    to_generation_options,
)
from vl2.cli.run import answer_streamed, report_warnings
from vl2.errors import VL2Error

_HELP = "/image FILE adds an image to the next question, /reset forgets the conversation, /quit ends it."


@click.command("chat")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path),
              help="An image for the first question.")
@generation_options
@max_tiles_option
@cache_options
@bundle_options
@debug_option
def command(bundle: Path, images: tuple[Path, ...], **choices: Any) -> None:
    """Keep a conversation with BUNDLE; questions are lines of standard input.

    The cache is kept between turns, so only what is new is computed.
    """
    options = to_generation_options(choices)
    model = open_as_asked(bundle, choices)
    click.echo(_HELP, err=True)
    converse(model, list(images), options)


def converse(model: Any, pending: list[Path], options: Any) -> None:
    """Answers the lines of standard input until it ends or `/quit`; an error is told and the talk goes on."""
    chat = model.chat()
    while (line := _next_line()) is not None:
        try:
            if line.startswith("/"):
                if (changed := _obey(line, pending)) is None:
                    return
                chat, pending = (model.chat(), []) if changed == "reset" else (chat, pending)
            elif line:
                report_warnings(answer_streamed(chat, line, tuple(pending), options, echo=True), options)
                pending = []
        except VL2Error as error:
            click.echo(f"error: {error}", err=True)


def _next_line() -> str | None:
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _obey(line: str, pending: list[Path]) -> str | None:
    """What a slash command changed: "image", "reset" or None to leave. Raises VL2Error on an unknown one."""
    word, *arguments = shlex.split(line)
    if word == "/image" and arguments:
        missing = [name for name in arguments if not Path(name).is_file()]
        if missing:
            raise VL2Error(f"there is no file `{missing[0]}`", hint="give the path of an image file")
        pending.extend(Path(name) for name in arguments)
        return "image"
    if word == "/reset":
        return "reset"
    if word == "/quit":
        return None
    raise VL2Error(f"`{line}` is not a command of the chat", hint=_HELP)

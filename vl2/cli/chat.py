"""`vl2 chat`: a conversation with a bundle on the terminal."""

import os
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
    while True:
        try:
            line = _next_line()
            if line is None:
                return
            if line.startswith("/"):
                if (changed := _obey(line, pending)) is None:
                    return
                chat, pending = (model.chat(), []) if changed == "reset" else (chat, pending)
            elif line:
                # Whatever becomes of the question: a broken image would make every later one fail too.
                images, pending = tuple(pending), []
                _answer(chat, line, images, options)
        except VL2Error as error:
            click.echo(f"error: {error}", err=True)


def _answer(chat: Any, question: str, images: tuple[Path, ...], options: Any) -> None:
    try:
        report_warnings(answer_streamed(chat, question, images, options, echo=True), options)
    except VL2Error:
        if images:
            click.echo(f"dropped with the question: {', '.join(map(str, images))}", err=True)
        raise


def _next_line() -> str | None:
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    # Bytes: a text stream that meets one that it cannot decode forgets what it has read beside it.
    line = sys.stdin.buffer.readline()
    try:
        return line.decode(sys.stdin.encoding).strip() if line else None
    except UnicodeDecodeError as error:
        raise VL2Error(f"the line is no {error.encoding} text: it has the byte 0x{line[error.start]:02x} in it",
                       hint="set the terminal to the encoding of the locale, and ask again") from error


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise VL2Error(f"`{line}` cannot be read: {error}",
                       hint='put a name that has a quote or a space into quotes: /image "Bob\'s page.png"') from error


def _obey(line: str, pending: list[Path]) -> str | None:
    """What a slash command changed: "image", "reset" or None to leave. Raises VL2Error on an unknown one."""
    word, *arguments = _words(line)
    if word == "/image" and arguments:
        missing = [name for name in arguments if not os.path.isfile(name)]
        if missing:
            raise VL2Error(f"there is no file `{missing[0]}`", hint="give the path of an image file")
        pending.extend(Path(name) for name in arguments)
        return "image"
    if word == "/reset":
        return "reset"
    if word == "/quit":
        return None
    raise VL2Error(f"`{line}` is not a command of the chat", hint=_HELP)

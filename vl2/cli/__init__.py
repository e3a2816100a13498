"""The command line: `vl2 VERB`, and `vl2-export` for `vl2 export`.

Verbs import what they need when they run, so that `--help` stays light and the device half never asks for torch.
"""

import importlib
import os
import sys
import traceback

import click

from vl2 import __version__
from vl2.errors import VL2Error

# Verbs in data-flow order; each lives in a module of its own name and is the `command` there.
VERBS = ("plan", "calibrate", "quantize", "convert", "export", "engine", "inspect", "run", "chat", "serve", "record",
         "layers", "compare", "bench", "demo", "doctor")


class VerbGroup(click.Group):
    """Loads a verb's module only when that verb is asked for, or listed in the help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return importlib.import_module(f"vl2.cli.{name}").command if name in VERBS else None


# For `vl2` and for `vl2-export`, which has no group above it.
_SETTINGS = {"help_option_names": ["-h", "--help"]}


@click.group(cls=VerbGroup, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="vl2")
def cli() -> None:
    """Export DeepSeek-VL2 and run it where there is no data centre."""


def run_command(command: click.Command, name: str, arguments: list[str] | None = None) -> int:
    """Exit code of a command: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Errors go to stderr."""
    state = {"debug": False}
    try:
        code = command.main(arguments, prog_name=name, standalone_mode=False, obj=state, **_SETTINGS)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except VL2Error as error:
        _report(error, state["debug"])
        return 1
    except BrokenPipeError:
        # The reader (head, less) has left; nothing may be flushed to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return 130
    except Exception as error:
        _report(VL2Error(f"unexpected {type(error).__name__}: {error}",
                         hint="this is a defect of vl2; `--debug` shows where it happened"), state["debug"])
        return 1


def _report(error: VL2Error, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    click.echo(f"error: {error}", err=True)


def main() -> None:
    """Entry point of `vl2`."""
    sys.exit(run_command(cli, "vl2"))


def export_main() -> None:
    """Entry point of `vl2-export`, the same as `vl2 export`."""
    sys.exit(run_command(importlib.import_module("vl2.cli.export").command, "vl2-export"))

"""Writes docs/cli.md from the commands' own `--help`: `python -m vl2.cli.reference > docs/cli.md`."""

import click

from vl2.cli import VERBS, cli

_HEAD = """# The command line

Results go to stdout, talk and progress to stderr. Exit code 0 is done, 1 failed, 2 wrong usage.
`vl2-export` is `vl2 export`. This page is the output of `python -m vl2.cli.reference`; a test keeps it so.
"""


def reference() -> str:
    """The whole page as Markdown."""
    root = click.Context(cli, info_name="vl2", terminal_width=100, max_content_width=100, **cli.context_settings)
    pages = [("vl2", cli.get_help(root))]
    for verb in VERBS:
        command = cli.get_command(root, verb)
        context = click.Context(command, info_name=verb, parent=root, terminal_width=100, max_content_width=100)
        pages.append((f"vl2 {verb}", command.get_help(context)))
    return _HEAD + "".join(f"\n## {title}\n\n```\n{text}\n```\n" for title, text in pages)


if __name__ == "__main__":
    click.echo(reference(), nl=False)

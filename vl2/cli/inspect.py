"""`vl2 inspect`: what a checkpoint or a bundle is, from headers alone."""

import json
from pathlib import Path

import click

from vl2.cli.options import debug_option, json_option


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--hashes", is_flag=True, help="Also compute the sha256 of a checkpoint's files (reads them whole).")
@json_option
@debug_option
def command(path: Path, hashes: bool, as_json: bool) -> None:
    """Tell what PATH is: variant, sizes by module, dtypes, graphs, hashes. Loads no weights."""
    from vl2.inspection import describe, inspect_path

    facts = inspect_path(path, hashes)
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else describe(facts))

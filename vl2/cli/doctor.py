"""`vl2 doctor`: what works on this machine, what does not, and the command that mends it."""

import json
from pathlib import Path

import click

from vl2.cli.options import debug_option, json_option

_MARKS = {"ok": "ok", "missing": "–", "failed": "FAILED"}


@click.command("doctor")
@json_option
@debug_option
def command(as_json: bool) -> int:
    """Try what vl2 needs on this machine: packages, onnxruntime's providers, GPU, memory, disk.

    Every line was tried, not looked up. Exit code 1 when bundles cannot be run here.
    """
    from vl2.machine.check import able
    from vl2.machine.examination import examine

    checks = []
    for check in examine(Path.cwd()):
        if not as_json:
            if not checks or checks[-1].area != check.area:
                click.echo(f"{check.area}")
            click.echo(f"  {_MARKS[check.status]:7}{check.name}: {check.detail}")
            if check.mend:
                click.echo(f"         mend: {check.mend}")
        checks.append(check)
    works = able(checks)
    if as_json:
        click.echo(json.dumps({"able": works, "checks": [vars(check) for check in checks]}, indent=2,
                              ensure_ascii=False))
    else:
        click.echo("bundles can be run here" if works else "bundles cannot be run here")
    return 0 if works else 1

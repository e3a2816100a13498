"""`vl2 demo`: the whole path on the shipped small model."""

from importlib import resources
from pathlib import Path

import click

from vl2.cli.options import debug_option

QUESTION = "What is the total?"


@click.command("demo")
@click.option("--out", type=click.Path(path_type=Path), default=Path("vl2-nano.bundle"), show_default=True,
              help="Where the bundle is written, or found from an earlier demo.")
@click.option("--image", type=click.Path(path_type=Path), help="An image of your own instead of the shipped receipt.")
@click.option("--prompt", default=QUESTION, show_default=True, help="The question.")
@debug_option
def command(out: Path, image: Path | None, prompt: str) -> None:
    """Export vl2-nano, ask it about an image, print where the bundle is."""
    from vl2.cli.run import answer_streamed, report_warnings
    from vl2.runtime import GenerationOptions, open_bundle

    shipped = Path(str(resources.files("vl2.nano")))
    image = image or shipped / "demo.png"
    if not (out / "manifest.json").exists():
        _export(shipped / "checkpoint", out)
    click.echo(f"image: {image}\nquestion: {prompt}", err=True)
    options = GenerationOptions()
    report_warnings(answer_streamed(open_bundle(out), prompt, (image,), options, echo=True), options)
    click.echo(f"bundle: {out.resolve()}")


def _export(checkpoint: Path, out: Path) -> None:
    from vl2.cli.export import workstation_half
    from vl2.cli.progress import ByteProgress

    export = workstation_half()
    click.echo(f"exporting {checkpoint} to {out}", err=True)
    with ByteProgress() as progress:
        export.export_checkpoint(checkpoint, out, export.ExportOptions(scheme="fp32"), progress)

"""Options that several verbs share, and what the runtime makes of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(dict)["debug"] = True


debug_option = click.option("--debug", is_flag=True, expose_value=False, callback=_remember_debug,
                            help="Show the traceback of an error.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")

_GENERATION = (
    click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True,
                 help="Stop after this many tokens."),
    click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
                 help="0 is greedy. The original's inference.py samples with 0.4."),
    click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True,
                 help="Nucleus sampling; the original's inference.py uses 0.9."),
    click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True,
                 help="Over prompt and answer, as the original does; its inference.py uses 1.1."),
    click.option("--stop", multiple=True, help="Stop before this string; may be given several times."),
    click.option("--seed", type=click.IntRange(min=0), help="Makes sampling repeatable."),
    click.option("--ignore-eos", is_flag=True, help="Go on after the end token, for measurements."),
    click.option("--prefill-chunk", type=click.IntRange(min=1), default=512, show_default=True,
                 help="Prompt tokens a prefill step takes; less needs less memory."),
)

_BUNDLE = (
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
                 help="auto takes CUDA where onnxruntime-gpu is installed and works."),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads; one a physical core without it."),
    click.option("--no-hash-check", is_flag=True, help="Check only the sizes of the bundle's files."),
    click.option("--no-memory-check", is_flag=True, help="Open a bundle larger than the available memory."),
)


def generation_options(command: Callable) -> Callable:
    """Adds the options of generation to a verb; it receives them as keyword arguments."""
    return _with_options(command, _GENERATION)


def bundle_options(command: Callable) -> Callable:
    """Adds the options of opening a bundle to a verb; it receives them as keyword arguments."""
    return _with_options(command, _BUNDLE)


def _with_options(command: Callable, options: tuple) -> Callable:
    for option in reversed(options):
        command = option(command)
    return command


def open_as_asked(bundle: Path, values: dict[str, Any]) -> Any:
    """The runtime's Model of a bundle; takes the keyword arguments of `bundle_options` out of `values`."""
    from vl2.cli.progress import ByteProgress
    from vl2.runtime import BundleOptions, open_bundle

    hashes, memory = not values.pop("no_hash_check"), not values.pop("no_memory_check")
    with ByteProgress() as progress:
        options = BundleOptions(device=values.pop("device"), threads=values.pop("threads"), check_hashes=hashes,
                                check_memory=memory, progress=progress)
        model = open_bundle(bundle, options)
    click.echo(f"backend: {model.backend}", err=True)
    return model


def to_generation_options(values: dict[str, Any]) -> Any:
    """GenerationOptions of the runtime from the keyword arguments of `generation_options`."""
    from vl2.runtime import GenerationOptions

    return GenerationOptions(**{**values, "stop": tuple(values["stop"])})

"""Options that several verbs share, and how they become GenerationOptions."""

from collections.abc import Callable
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


def generation_options(command: Callable) -> Callable:
    """Adds the options of generation to a verb; it receives them as keyword arguments."""
    for option in reversed(_GENERATION):
        command = option(command)
    return command


def to_generation_options(values: dict[str, Any]) -> Any:
    """GenerationOptions of the runtime from the keyword arguments of `generation_options`."""
    from vl2.runtime import GenerationOptions

    return GenerationOptions(**{**values, "stop": tuple(values["stop"])})

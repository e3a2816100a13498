"""`vl2 plan`: whether a model fits a device, how fast it may be, and what to change, before anything is downloaded."""

import json
import re
from pathlib import Path
from typing import Any

import click

from vl2.cli.options import RECIPES, ByteSize, debug_option, json_option, max_tiles_option

_OUTER = click.Choice(["fp16", "int8"])


class ImageSize(click.ParamType):
    """A size such as 1920x1080, in pixels."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)[x×](\d+)", str(value))
        if match is None or not int(match[1]) or not int(match[2]):
            self.fail(f"{value!r} is no size, expected such as 1920x1080", param, ctx)
        return int(match[1]), int(match[2])


@click.command("plan")
@click.argument("model", required=False)
@click.option("--target", default="local", show_default=True,
              help="A device of --list-targets; local is this machine, measured, local-gpu its first GPU.")
@click.option("--image", "sizes", multiple=True, type=ImageSize(), help="An image's size; may be given several times.")
@click.option("--images", type=click.IntRange(min=1), default=1, show_default=True, help="So many of each --image.")
@click.option("--text-tokens", type=click.IntRange(min=1), default=64, show_default=True,
              help="Tokens of the question, template included.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens to keep room for; all that the model holds "
              "without it.")
@max_tiles_option
@click.option("--prefill-chunk", type=click.IntRange(min=1), default=512, show_default=True,
              help="As of `vl2 run`.")
@click.option("--serve", "pool", type=ByteSize(), metavar="SIZE",
              help="Plan for `vl2 serve` with this --kv-cache, such as 512MiB.")
@click.option("--scheme", type=click.Choice(["fp32", "fp16", *RECIPES]),
              help="How weights are stored; without it the one that keeps most and fits.")
@click.option("--vision", type=_OUTER, help="As of `vl2 export`.")
@click.option("--head", type=_OUTER, help="As of `vl2 export`.")
@click.option("--embeddings", type=_OUTER, help="As of `vl2 export`.")
@click.option("--lowering", type=click.Choice(["ort", "cpu", "portable"]), help="As of `vl2 export`.")
@click.option("--kv-cache", type=click.Choice(["fp32", "fp16", "int8"]), help="As of `vl2 export`.")
@click.option("--targets", "targets_file", type=click.Path(path_type=Path),
              help="A file of more targets, like vl2/planning/targets.json.")
@click.option("--list-targets", is_flag=True, help="Print the targets and where their figures are from.")
@json_option
@debug_option
def command(model: str | None, targets_file: Path | None, list_targets: bool, as_json: bool, **choices: Any) -> None:
    """Tell whether MODEL fits a device: tiles, tokens, weights, cache, peak memory, speed, and what to change.

    MODEL is `tiny`, `small`, `base` or a published model's hub id, for which nothing is downloaded, or the folder of a
    checkpoint or bundle. Memory on a CPU is checked against measured runs; GPUs and speeds are estimates.
    """
    from vl2.planning.targets import read_targets
    from vl2.planning.text import describe, describe_targets

    targets = read_targets(targets_file)
    if list_targets:
        facts = {name: vars(target) for name, target in targets.items()}
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else describe_targets(targets))
        return
    if model is None:
        raise click.UsageError("MODEL is missing: tiny, small, base, or a folder.")
    if choices["images"] > 1 and not choices["sizes"]:
        raise click.UsageError("--images says how many of each --image; give an --image such as 1920x1080.")
    plan = _plan(model, targets, choices)
    click.echo(json.dumps(plan.to_dict(), indent=2, ensure_ascii=False) if as_json else describe(plan))


def _plan(model: str, targets: Any, choices: dict[str, Any]) -> Any:
    from vl2.planning.demand import Demand
    from vl2.planning.local import local_target
    from vl2.planning.models import planned_model
    from vl2.planning.plan import Situation, make_plan
    from vl2.planning.targets import LOCAL, target_named

    planned, name = planned_model(model), choices["target"]
    target = local_target(name) if name in LOCAL else target_named(name, targets)
    demand = Demand(choices["sizes"] * choices["images"], choices["text_tokens"], choices["context"],
                    choices["max_tiles"], choices["prefill_chunk"], choices["pool"])
    return make_plan(Situation(planned, demand, name, target, choices["lowering"], choices["kv_cache"]),
                     _choice(choices))


def _choice(choices: dict[str, Any]) -> Any:
    from vl2.planning.schemes import EXPERT_FORMS, Choice

    outer = {key: choices[option] for key, option in
             (("vision", "vision"), ("lm_head", "head"), ("embeddings", "embeddings")) if choices[option]}
    if outer and choices["scheme"] not in EXPERT_FORMS:
        raise click.UsageError("--vision, --head and --embeddings belong to a --scheme with int8 or int4.")
    return Choice(choices["scheme"], **outer) if choices["scheme"] else None

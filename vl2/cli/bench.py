"""`vl2 bench`: speed, memory and bandwidth of a bundle, or of two side by side."""

import json
from pathlib import Path
from typing import Any

import click

from vl2.cli.options import bundle_options, debug_option, max_tiles_option, to_backend_options
from vl2.cli.plan import ImageSize


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--compare", "other", type=click.Path(path_type=Path),
              help="Measure this bundle in the same rounds, in turn with BUNDLE, and show both with ratios.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True,
              help="Measurements of each bundle; medians are told.")
@click.option("--context", "contexts", multiple=True, type=click.IntRange(min=1),
              help="Measure decode at so many prompt tokens; may be given several times. Without it 128, 512 and 2048, "
              "as far as the model holds them.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True,
              help="Tokens generated at each context.")
@click.option("--image", "image_size", type=ImageSize(),
              help="Pixels of the image to encode; without it one tile and its global view.")
@click.option("--prefill-chunk", type=click.IntRange(min=1), default=512, show_default=True, help="As of `vl2 run`.")
@max_tiles_option
@bundle_options
@debug_option
def command(bundle: Path, other: Path | None, rounds: int, **choices: Any) -> None:
    """Measure BUNDLE: load, first token, image, prefill, decode, memory, and the share of this machine's bandwidth.

    Each round is a new process. A table, then one line of JSON that has every round.
    """
    from vl2.measure.bench import Setting, run_bench
    from vl2.measure.text import describe

    bundles = [bundle] if other is None else [bundle, other]
    options = {"check_hashes": not choices["no_hash_check"], "check_memory": not choices["no_memory_check"],
               "max_tiles": choices["max_tiles"], **to_backend_options(choices)}
    setting = Setting(_workload(bundles, choices), rounds, options, lambda line: click.echo(line, err=True))
    bench = run_bench(bundles, setting)
    click.echo(describe(bench))
    click.echo(json.dumps(bench.to_dict(), ensure_ascii=False))


def _workload(bundles: list[Path], choices: dict[str, Any]) -> Any:
    from vl2.manifest import read_manifest
    from vl2.measure.workload import Workload, check_contexts, fitting_contexts

    manifests = [read_manifest(bundle) for bundle in bundles]
    new_tokens = choices["new_tokens"]
    contexts = tuple(sorted(set(choices["contexts"]))) or fitting_contexts(manifests, new_tokens)
    workload = Workload(contexts, new_tokens, choices["image_size"], choices["prefill_chunk"])
    check_contexts(workload, manifests)
    return workload

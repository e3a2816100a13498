"""`vl2 engine`: TensorRT engines of a bundle for a device, built here or, where that cannot be, the command for it."""

import json
import shlex
from pathlib import Path
from typing import Any

import click

from vl2.backends import ENGINES_OF
from vl2.cli.options import debug_option, json_option
from vl2.errors import VL2Error

_PREFILL_CHUNK = 512
_RUN_BY = {engines: backend for backend, engines in ENGINES_OF.items()}


@click.command("engine")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target",
    required=True,
    metavar="NAME",
    help="A device of `vl2 plan --list-targets`; local is the GPU of this machine.",
)
@click.option(
    "--targets",
    "targets_file",
    type=click.Path(path_type=Path),
    help="A file of more targets, like vl2/planning/targets.json.",
)
@click.option(
    "--backend",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    help="Without it TensorRT-RTX for GeForce and RTX GPUs, TensorRT for all others.",
)
@click.option(
    "--context", type=click.IntRange(min=1), help="Tokens the cache holds; all that the model holds without it."
)
@click.option(
    "--prefill-chunk",
    type=click.IntRange(min=1),
    help="Prompt tokens a prefill step takes; 512, or the whole context where it is shorter, without it.",
)
@click.option(
    "--tiles",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Image tiles that one run of the tower takes; more go through by turns.",
)
@click.option("--dry-run", is_flag=True, help="Check only whether they fit and where they can be built.")
@click.option("--force", is_flag=True, help="Build again over engines that the bundle has for the target.")
@json_option
@debug_option
def command(bundle: Path, as_json: bool, **choices: Any) -> None:
    """Build TensorRT engines of BUNDLE (of `vl2 export --lowering trt`) for a device, into the bundle.

    Engines for GeForce and RTX GPUs are built on any x86-64 Linux machine with the extra [engine]; those for Jetson
    boards on the board itself. `vl2 run BUNDLE` then runs them there.
    """
    facts = make_engines(bundle, choices)
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else describe(facts))


def check_target(name: str) -> None:
    """Raises VL2Error for a target of the shipped table that engines cannot be made for, or not on this machine for
    lack of a package."""
    from vl2.planning.targets import read_targets
    from vl2.plugins.tensorrt.flavour import load_tensorrt

    target = _target(name, read_targets(None))
    if _builds_here(target.engine_backend, target):
        load_tensorrt(target.engine_backend)


def make_engines(bundle: Path, choices: dict[str, Any]) -> dict[str, Any]:
    """What `vl2 engine` does and prints; choices: its options by name."""
    from vl2.manifest import check_sizes, read_manifest
    from vl2.planning.engine_fit import check_fit, engine_fit
    from vl2.planning.targets import read_targets

    name, targets = choices["target"], read_targets(choices["targets_file"])
    target = _target(name, targets)
    backend = choices["backend"] or target.engine_backend
    manifest = read_manifest(bundle)
    check_sizes(bundle, manifest)
    context = choices["context"] or manifest.language.max_position_embeddings
    choices["prefill_chunk"] = _chunk(choices["prefill_chunk"], context)
    fit = engine_fit(str(bundle), target, choices["context"], choices["prefill_chunk"])
    here = _builds_here(backend, target)
    check_fit(fit, name, built_there=backend == "tensorrt")
    if name in manifest.engines and not choices["force"] and not choices["dry_run"]:
        _check_those_there(bundle, name, manifest.engines[name], (backend, target))
    command = _command(bundle, name, context, choices)
    if not here:
        raise VL2Error(
            f"the engines for {name} fit ({fit.run.peak / 1e9:.2f} of {fit.usable / 1e9:.2f} GB), and are "
            f"built by {backend} on the device itself: this machine has no GPU of compute capability "
            f"{target.compute_capability}",
            f"copy the bundle there and run `{command}`",
        )
    facts: dict[str, Any] = {
        "bundle": str(bundle),
        "target": name,
        "backend": backend,
        "fit": fit.to_dict(),
        "command": command,
    }
    if not choices["dry_run"]:
        facts["engines"] = _build(bundle, (name, target, backend), context, choices)
    return facts


def _chunk(asked: int | None, context: int) -> int:
    if asked is not None and asked > context:
        raise VL2Error(f"--prefill-chunk is {asked} and the context {context} tokens",
                       "a chunk is no longer than the context; leave --prefill-chunk out")  # fmt: skip
    return asked or min(_PREFILL_CHUNK, context)


def _check_those_there(bundle: Path, name: str, record: Any, chosen: tuple[str, Any]) -> None:
    """Raises VL2Error: that the engines serve already, or why they do not."""
    from vl2.engine_record import EngineHost, check_engines
    from vl2.plugins.tensorrt.flavour import load_tensorrt
    from vl2.plugins.tensorrt.sources import plugin_hash

    backend, target = chosen
    version = load_tensorrt(backend).__version__
    check_engines(name, record, EngineHost(backend, version, target.compute_capability, plugin_hash()))
    raise VL2Error(f"{bundle} has engines for {name} already", "give --force to build them again, of other sizes")


def _target(name: str, targets: Any) -> Any:
    from vl2.planning.local import local_target
    from vl2.planning.targets import LOCAL, target_named

    target = local_target("local-gpu") if name in LOCAL else target_named(name, targets)
    if target.engine_backend is None:
        raise VL2Error(
            f"{name} runs {', '.join(target.backends)}, and no TensorRT engines",
            "vl2 export without --lowering makes what it runs",
        )
    if target.compute_capability is None:
        raise VL2Error(
            f"{name} has no compute_capability, which engines are built for",
            'add it to the file of targets, such as "8.7" (developer.nvidia.com/cuda-gpus)',
        )
    return target


def _builds_here(backend: str, target: Any) -> bool:
    """TensorRT-RTX compiles for any of its GPUs; TensorRT measures kernels on the GPU it builds for."""
    return backend == "tensorrt-rtx" or target.compute_capability in _capabilities()


def _capabilities() -> list[str]:
    from vl2.machine.cuda_driver import DriverError, find_gpus

    try:
        return [gpu.compute_capability for gpu in find_gpus()]
    except DriverError:
        return []


def _build(bundle: Path, chosen: tuple[str, Any, str], context: int, choices: dict[str, Any]) -> dict[str, Any]:
    from vl2.json_file import to_json
    from vl2.planning.targets import LOCAL
    from vl2.plugins.tensorrt.engines import EngineSizes, EngineTarget, build_engines
    from vl2.plugins.tensorrt.flavour import load_tensorrt

    name, target, backend = chosen
    load_tensorrt(backend)
    sizes = EngineSizes(context, choices["prefill_chunk"], choices["tiles"])
    where = EngineTarget(name, backend, target.compute_capability, on_this_gpu=name in LOCAL)

    def progress(graph: str, number: int, total: int) -> None:
        if number < total:
            click.echo(f"building {graph} ({number + 1} of {total})", err=True)

    return to_json(build_engines(bundle, where, sizes, progress))


def _command(bundle: Path, name: str, context: int, choices: dict[str, Any]) -> str:
    """What builds the same engines on the device."""
    words = ["vl2", "engine", bundle.name, "--target", name, "--context", str(context)]
    words += ["--prefill-chunk", str(choices["prefill_chunk"]), "--tiles", str(choices["tiles"])]
    if choices["backend"] is not None:
        words += ["--backend", choices["backend"]]
    if choices["targets_file"] is not None:
        words += ["--targets", choices["targets_file"].name]
    return shlex.join(words)


def describe(facts: dict[str, Any]) -> str:
    """`make_engines` as lines."""
    run, fit = facts["fit"]["run"], facts["fit"]
    lines = [
        f"{facts['bundle']} for {facts['target']} by {facts['backend']}: a run needs {run['peak'] / 1e9:.2f} of "
        f"{fit['usable_bytes'] / 1e9:.2f} GB (estimated)"
    ]
    if "engines" not in facts:
        return "\n".join([*lines, f"build with `{facts['command']}`"])
    record = facts["engines"]
    for graph, built in record["builds"].items():
        lines.append(
            f"{record['files'][graph]}: {built['size_bytes'] / 1e6:.1f} MB, {built['seconds']:.1f} s, peak memory "
            f"{built['peak_rss_bytes'] / 1e9:.2f} GB"
        )
    return "\n".join(
        [
            *lines,
            f"{record['backend']} {record['version']}, compute capability "
            f"{record['compute_capability']}; on such a GPU `vl2 run {facts['bundle']} --backend "
            f"{_RUN_BY[record['backend']]}` runs them",
        ]
    )

"""A plan and the table of targets as text for a person."""

from __future__ import annotations

from collections.abc import Mapping

from vl2.planning.plan import Plan, Run
from vl2.planning.targets import Target

_BACKENDS = {
    "cpu": "onnxruntime on the CPU",
    "cuda": "onnxruntime-gpu; memory and speed estimated, not measured",
    "engine": "TensorRT engines, which `vl2 engine` builds; never run on a GPU yet, memory and speed estimated",
}


def describe(plan: Plan) -> str:
    """Everything that the JSON says, in a page."""
    situation = plan.situation
    model, target = situation.model, situation.target
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"{model.name} ({model.config.variant}), {plan.options}, lowering {plan.storage.lowering}: {verdict} on "
        f"{situation.target_name}",
        f"{target.description}: {_size(target.usable_bytes)} usable of {target.memory_gib:g} GiB {target.memory} "
        f"memory, {target.bandwidth_gb_s:g} GB/s",
        "", *_prompt_lines(plan), "", *_module_lines(plan), "", *_run_lines(plan),
        "", *_workstation_lines(plan),
    ]
    if plan.schemes:
        lines += ["", *_scheme_lines(plan)]
    if plan.changes:
        lines += ["", "what would make it fit", *(f"  {change}" for change in plan.changes)]
    return "\n".join(lines)


def _prompt_lines(plan: Plan) -> list[str]:
    prompt, demand = plan.prompt, plan.situation.demand
    lines = ["prompt"]
    for (width, height), (wide, high) in zip(demand.images, prompt.crops, strict=True):
        lines.append(f"  image {width}x{height}: {wide}x{high} tiles and the global view")
    room = f"room for {prompt.context - prompt.prompt_tokens:,} of an answer" if prompt.fits else "too long"
    return [*lines, f"  {prompt.tiles} tiles, {prompt.image_tokens:,} image tokens, {demand.text_tokens:,} of text; "
            f"context {prompt.context:,}, {room}"]


def _module_lines(plan: Plan) -> list[str]:
    storage = plan.storage
    rows = [f"  {name:20} {_size(size):>10} {_size(storage.read.get(name, 0)):>12}"
            for name, size in sorted(storage.modules.items())]
    return [f"{'weights':22} {'stored':>10} {'read a token':>12}", *rows,
            f"  {'all':20} {_size(storage.total_bytes):>10} {_size(storage.read_bytes):>12}"]


def _run_lines(plan: Plan) -> list[str]:
    lines = []
    for name, run in plan.runs.items():
        lines += [f"run, {name} ({_BACKENDS[name]}): {'fits' if run.fits else 'does not fit'}",
                  *_memory_lines(plan, run), *_speed_lines(run)]
    if "cpu" in plan.runs and plan.storage.lowering != "ort":
        lines.append("  (weights are mapped: those of experts that no token chose stay out of memory)")
    return lines


def _memory_lines(plan: Plan, run: Run) -> list[str]:
    memory = run.memory
    return [f"  peak {_size(memory.peak)}: weights {_size(memory.weights)}, cache of {plan.prompt.context:,} tokens "
            f"{_size(memory.kv_cache)}, activations {_size(memory.activations)}, process {_size(memory.process)}"
            + (f", server {_size(memory.server)}" if memory.server else "")]


def _speed_lines(run: Run) -> list[str]:
    speed = run.speed
    images = f"images {_time(speed.image_seconds)}, " if speed.image_seconds else ""
    return [f"  about: {images}prefill {_time(speed.prefill_seconds)}, {speed.tokens_per_second:.1f} tokens/s; "
            f"{_size(speed.read_bytes_per_token)} read a token, at most {speed.limit_tokens_per_second:.0f} tokens/s"]


def _workstation_lines(plan: Plan) -> list[str]:
    memory = plan.workstation
    parts = {"export": memory.export, "quantize with calibration": memory.quantize,
             "engine build": memory.build}
    told = [f"{name} {_size(size)}" for name, size in parts.items() if size is not None]
    return ["peak memory where it is made: " + ", ".join(told)]


def _scheme_lines(plan: Plan) -> list[str]:
    backend = next(iter(plan.runs))
    head = f"{'schemes on ' + backend:66} {'bundle':>9} {'peak':>9} {'tokens/s':>9}"
    return [head, *(f"  {name:64} {_size(bundle):>9} {_size(peak):>9} {speed:>9.1f}  {'fits' if fits else ''}".rstrip()
                    for name, (bundle, peak, speed, fits) in plan.schemes.items())]


def describe_targets(targets: Mapping[str, Target]) -> str:
    """A line a target, with where its figures are from."""
    lines = [f"{'target':16} {'GiB':>5} {'GB/s':>6} {'usable':>6}  {'cc':4} {'backends':12} source"]
    for name, target in targets.items():
        lines.append(f"{name:16} {target.memory_gib:>5g} {target.bandwidth_gb_s:>6g} {target.usable_share:>6.0%}  "
                     f"{target.compute_capability or '–':4} {', '.join(target.backends):12} {target.source}")
    return "\n".join(lines)


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"

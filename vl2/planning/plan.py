"""The plan: does a model fit a target under a demand, how fast may it be, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from vl2.errors import VL2Error
from vl2.planning.backends import backends_of, default_lowering, on_engines
from vl2.planning.demand import Demand, PromptSize, prompt_size
from vl2.planning.memory import KV_CACHES, RunMemory, cache_bytes, run_memory, server_memory
from vl2.planning.models import NAMES, PlannedModel, planned_model
from vl2.planning.schemes import (
    CPU,
    EXPERT_FORMS,
    ORT,
    PORTABLE,
    Choice,
    Storage,
    form_of_checkpoint,
    form_of_choice,
    storage_of,
)
from vl2.planning.speed import Speed, estimate_speed
from vl2.planning.targets import Target
from vl2.planning.workstation import WorkstationMemory, workstation_memory

_ALL_INT8 = {"vision": "int8", "lm_head": "int8", "embeddings": "int8"}
# From what keeps most to what needs least.
LADDER = (
    Choice("fp32"), Choice("fp16"), Choice("int8"), Choice("int8", **_ALL_INT8), Choice("int4"),
    Choice("int4", **_ALL_INT8), Choice("int4-g64", **_ALL_INT8), Choice("int4-g128", **_ALL_INT8),
)
_ASKED_ONLY = "fp32"
_SMALL_CHUNK = 128
_SHORTEST_ANSWER = 64


@dataclass(frozen=True)
class Situation:
    """What a plan is made for; lowering, kv_cache: as of `vl2 export`, None as it chooses."""

    model: PlannedModel
    demand: Demand
    target_name: str
    target: Target
    lowering: str | None = None
    kv_cache: str | None = None


@dataclass(frozen=True)
class Run:
    """One backend. fits: the peak is within the target's usable memory and the prompt within the context."""

    memory: RunMemory
    speed: Speed
    fits: bool


@dataclass(frozen=True)
class Plan:
    """runs: by backend, the first is what this version of vl2 does on the target. options: of `vl2 export`.

    schemes: options → (bundle bytes, peak bytes, tokens/s, fits) on the first backend. changes: what would make it fit.
    """

    situation: Situation
    options: str
    prompt: PromptSize
    storage: Storage
    runs: dict[str, Run]
    workstation: WorkstationMemory
    schemes: dict[str, tuple[int, int, float, bool]]
    changes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """On the first backend."""
        return next(iter(self.runs.values())).fits

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON has it; sizes in bytes, times in seconds."""
        model, target = self.situation.model, self.situation.target
        language = model.config.language_config
        return {
            "model": model.name, "variant": model.config.variant, "attention": "mla" if language.use_mla else "mha",
            "target": {"name": self.situation.target_name, **asdict(target), "usable_bytes": int(target.usable_bytes)},
            "options": self.options, "lowering": self.storage.lowering,
            "demand": asdict(self.situation.demand), "prompt": asdict(self.prompt),
            "bundle_bytes": self.storage.total_bytes, "modules": self.storage.modules,
            "read_bytes_per_token": {name: int(size) for name, size in self.storage.read.items()},
            "kv_cache": self.storage.kv_cache,
            "cache_bytes_per_token": cache_bytes(language, KV_CACHES[self.storage.kv_cache]), "fits": self.fits,
            "runs": {name: {"fits": run.fits, "memory": run.memory.to_dict(), "speed": asdict(run.speed)}
                     for name, run in self.runs.items()},
            "workstation": asdict(self.workstation),
            "schemes": [dict(zip(("options", "bundle_bytes", "peak_bytes", "tokens_per_second", "fits"),
                                 (name, *row), strict=True)) for name, row in self.schemes.items()],
            "changes": list(self.changes),
        }


def make_plan(situation: Situation, choice: Choice | None = None) -> Plan:
    """choice: None takes what keeps most and fits; it cannot be given for a model that is stored already.

    Raises VL2Error for a context or a tile budget that the model does not have.
    """
    model, situation = situation.model, _with_lowering(situation)
    if situation.lowering == CPU and "cpu" not in situation.target.backends:
        raise VL2Error(f"the lowering `cpu` is for CPUs, and {situation.target_name} runs "
                       f"{', '.join(situation.target.backends)}", "leave --lowering out")
    already = _stored_already(situation, choice)
    ladder = LADDER if already is None else ()
    if situation.lowering is not None:
        ladder = [each for each in ladder if _takes(each, situation.lowering)]
    stored = {each: _stored(situation, each) for each in ladder}
    backends = backends_of(model, situation.target_name, situation.target)
    tried = {each: _run(situation, storage, backends[0]) for each, storage in stored.items()}
    if already is None and choice is None:
        choice = next((each for each in ladder if each.scheme != _ASKED_ONLY and tried[each].fits), ladder[-1])
    storage = already or stored.get(choice) or _stored(situation, choice)
    plan = Plan(
        situation, choice.options if choice else str(model.scheme), prompt_size(model, situation.demand), storage,
        {backend: _run(situation, storage, backend) for backend in backends},
        workstation_memory(model, choice, "engine" in situation.target.backends),
        {each.options: (stored[each].total_bytes, run.memory.peak, run.speed.tokens_per_second, run.fits)
         for each, run in tried.items()}, (),
    )
    return plan if plan.fits else replace(plan, changes=tuple(_changes(plan)))


def _with_lowering(situation: Situation) -> Situation:
    """The lowering that a cache needs, where none was asked for."""
    needed = situation.lowering is None and situation.kv_cache not in (None, "fp32") and not situation.model.is_bundle
    return replace(situation, lowering=CPU) if needed else situation


def _stored_already(situation: Situation, choice: Choice | None) -> Storage | None:
    """Of a bundle or a quantized checkpoint; None for a model whose scheme is still to be chosen."""
    model, lowering = situation.model, situation.lowering
    if model.storage is None:
        return None
    if choice is not None:
        raise VL2Error(f"`{model.name}` is stored already ({model.scheme}), and {choice.options} was asked for",
                       "leave the scheme out, or plan for the checkpoint that it was made from")
    if not model.is_bundle:
        lowering = lowering or default_lowering(situation.target)
    if lowering in (None, model.storage.lowering):
        return _with_cache(model.storage, situation)
    if model.is_bundle:
        raise VL2Error(f"`{model.name}` has the lowering `{model.storage.lowering}`, and `{lowering}` was asked for",
                       "leave it out, or plan for the checkpoint that the bundle was made from")
    return _with_cache(storage_of(model.tensors, form_of_checkpoint(model.config), 2, lowering), situation)


def _with_cache(storage: Storage, situation: Situation) -> Storage:
    """The storage with the cache that was asked for; a bundle has the one that it was exported with."""
    kv_cache, model = situation.kv_cache, situation.model
    if kv_cache in (None, storage.kv_cache):
        return storage
    if model.is_bundle:
        raise VL2Error(f"`{model.name}` has the KV cache `{storage.kv_cache}`, and `{kv_cache}` was asked for",
                       "leave it out, or plan for the checkpoint that the bundle was made from")
    if storage.lowering != CPU:
        raise VL2Error(f"the KV cache `{kv_cache}` was asked for with the lowering `{storage.lowering}`, "
                       "whose caches are fp32", "give --lowering cpu as well, or leave --kv-cache out")
    return replace(storage, kv_cache=kv_cache)


def _takes(choice: Choice, lowering: str) -> bool:
    """Whether a lowering holds a scheme's weights."""
    return {PORTABLE: True, ORT: choice.scheme in EXPERT_FORMS, CPU: choice.scheme != "fp32"}[lowering]


def _stored(situation: Situation, choice: Choice) -> Storage:
    model = situation.model
    lowering = situation.lowering or (default_lowering(situation.target) if choice.scheme in EXPERT_FORMS else None)
    return _with_cache(storage_of(model.tensors, form_of_choice(choice, model.config),
                                  4 if choice.scheme == "fp32" else 2, lowering), situation)


def _run(situation: Situation, storage: Storage, backend: str) -> Run:
    model, target = situation.model, situation.target
    size = prompt_size(model, situation.demand)
    if backend == "engine":
        storage = on_engines(model, storage)
    memory = run_memory(model, storage, size, backend, target.memory == "shared")
    memory = replace(memory, server=server_memory(situation.demand.pool_bytes))
    speed = estimate_speed(model, storage, size, target, backend)
    return Run(memory, speed, memory.peak <= target.usable_bytes and size.fits)


def _changes(plan: Plan) -> list[str]:
    """Single changes that each make it fit; where none does, the strongest of all together."""
    if not plan.prompt.fits:
        return _shorter_prompts(plan)
    found = [change for find in (_other_scheme, _narrower_cache, _smaller_chunk, _smaller_pool, _shorter_context,
                                     _smaller_variant)
             if (change := find(plan)) is not None]
    return found or ["nothing that vl2 offers makes it fit: take a target with more memory"]


def _other_scheme(plan: Plan) -> str | None:
    options = next((name for name, row in plan.schemes.items() if row[3]), None)
    return None if options is None else f"{options}: peak {plan.schemes[options][1] / 1e9:.2f} GB"


def _narrower_cache(plan: Plan) -> str | None:
    situation = plan.situation
    taken = situation.model.storage is not None or situation.kv_cache is not None
    if taken or situation.lowering not in (None, CPU) or "cpu" not in plan.runs:
        return None
    for kv_cache in ("fp16", "int8"):
        other = make_plan(replace(situation, kv_cache=kv_cache))
        if other.runs["cpu"].fits:
            return (f"{other.options} --kv-cache {kv_cache}: peak "
                    f"{other.runs['cpu'].memory.peak / 1e9:.2f} GB on the CPU")
    return None


def _smaller_chunk(plan: Plan) -> str | None:
    demand = plan.situation.demand
    if demand.prefill_chunk <= _SMALL_CHUNK:
        return None
    return _if_it_fits(plan, replace(demand, prefill_chunk=_SMALL_CHUNK), lambda _: f"--prefill-chunk {_SMALL_CHUNK}")


def _smaller_pool(plan: Plan) -> str | None:
    demand, peak = plan.situation.demand, next(iter(plan.runs.values())).memory.peak
    room = int(plan.situation.target.usable_bytes - peak + (demand.pool_bytes or 0)) >> 20
    if demand.pool_bytes is None or room < 1:
        return None
    return _if_it_fits(plan, replace(demand, pool_bytes=room << 20), lambda _: f"--serve {room}MiB")


def _shorter_context(plan: Plan) -> str | None:
    memory, model = next(iter(plan.runs.values())).memory, plan.situation.model
    per_token = memory.kv_cache // plan.prompt.context
    room = int((plan.situation.target.usable_bytes - memory.peak + memory.kv_cache) // per_token)
    context = min(room, plan.prompt.context)
    if context < plan.prompt.prompt_tokens + _SHORTEST_ANSWER:
        return None
    assert context <= model.config.language_config.max_position_embeddings
    return _if_it_fits(plan, replace(plan.situation.demand, context=context), lambda _: f"--context {context}")


def _smaller_variant(plan: Plan) -> str | None:
    name = next((short for short, hub in NAMES.items() if hub == plan.situation.model.name), None)
    for smaller in reversed(list(NAMES)[:list(NAMES).index(name)] if name else []):
        other = make_plan(replace(plan.situation, model=planned_model(smaller)))
        if other.fits:
            peak = next(iter(other.runs.values())).memory.peak
            return f"{NAMES[smaller]} {other.options}: peak {peak / 1e9:.2f} GB"
    return None


def _shorter_prompts(plan: Plan) -> list[str]:
    """Changes of a prompt that leaves no room for an answer in the context."""
    demand, prompt = plan.situation.demand, plan.prompt
    found = [f"a context of more than {prompt.prompt_tokens:,} tokens"] if prompt.prompt_tokens < prompt.limit else []
    most = max((wide * high for wide, high in prompt.crops), default=1)
    for limit in range(most - 1, 0, -1):
        shorter = prompt_size(plan.situation.model, replace(demand, max_tiles=limit))
        if shorter.prompt_tokens + _SHORTEST_ANSWER <= prompt.context:
            return [*found, f"--max-tiles {limit}: {shorter.prompt_tokens:,} tokens"]
    return found or ["fewer images or less text"]


def _if_it_fits(plan: Plan, demand: Demand, told: Callable[[Run], str]) -> str | None:
    backend = next(iter(plan.runs))
    run = _run(replace(plan.situation, demand=demand), plan.storage, backend)
    return f"{told(run)}: peak {run.memory.peak / 1e9:.2f} GB" if run.fits else None

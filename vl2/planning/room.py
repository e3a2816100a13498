"""How large a bundle a target has room for: the budget of `vl2 export --target`."""

from __future__ import annotations

from dataclasses import replace

from vl2.errors import VL2Error
from vl2.planning.backends import default_lowering
from vl2.planning.demand import Demand
from vl2.planning.local import local_target
from vl2.planning.models import planned_model
from vl2.planning.plan import Situation, make_plan
from vl2.planning.schemes import Choice
from vl2.planning.targets import LOCAL, Target, read_targets, target_named

# One image, which every candidate resolution can hold, and the model's whole context.
_DEMAND = Demand(((4096, 4096),))
# The lowering that engines are built of.
_ENGINE = "trt"
# The token table is read row by row; it is counted as small as a recipe can make it.
_SMALLEST = Choice("int4", "int8", "int8", "int8")


def lowering_for(target_name: str) -> str:
    """The lowering of packed weights that runs on a target's first backend. Raises VL2Error for an unknown one."""
    return default_lowering(_target(target_name))


def bundle_room(model: str, target_name: str, lowering: str | None = None, kv_cache: str | None = None) -> int:
    """Bytes of the largest bundle of an unquantized model that runs on a target, beside the cache of its whole context,
    activations and the process.

    model: as `planned_model` takes it; lowering, kv_cache: as of `vl2 export`. Raises VL2Error where nothing is left.
    """
    target = _target(target_name)
    engine = lowering == _ENGINE
    if engine and target.engine_backend is None:
        raise VL2Error(f"{target_name} runs {', '.join(target.backends)}, and no TensorRT engines",
                       "leave --lowering out, or take another target")
    lowering, kv_cache = (None, None) if engine else (lowering, kv_cache)
    plan = make_plan(Situation(planned_model(model), _DEMAND, target_name, target, lowering, kv_cache), _SMALLEST)
    memory = (plan.runs["engine"] if engine else next(iter(plan.runs.values()))).memory
    room = int(target.usable_bytes) - replace(memory, weights=0).peak
    if room <= 0:
        raise VL2Error(f"{target_name} has {target.usable_bytes / 1e9:.2f} GB for a run, which cache, activations and "
                       f"process take whole ({replace(memory, weights=0).peak / 1e9:.2f} GB)",
                       "take another target, or --kv-cache int8")
    return room + plan.storage.modules["embed_tokens"]


def _target(name: str) -> Target:
    return local_target(name) if name in LOCAL else target_named(name, read_targets())

"""Whether engines of a bundle fit a target, before any is built: memory of a run, and of building them there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vl2.errors import VL2Error
from vl2.planning.demand import Demand, prompt_size
from vl2.planning.memory import RunMemory, run_memory
from vl2.planning.models import planned_model
from vl2.planning.targets import Target
from vl2.planning.workstation import build_bytes

# One image, which every candidate resolution can hold.
_IMAGES = ((4096, 4096),)
_LOWERING = "trt"


@dataclass(frozen=True)
class EngineFit:
    """Bytes: of a run, of a build on the target, and what a program can have there."""

    run: RunMemory
    build: int
    usable: int

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"run": self.run.to_dict(), "build_bytes": self.build, "usable_bytes": self.usable}


def engine_fit(bundle: str, target: Target, context: int | None, prefill_chunk: int) -> EngineFit:
    """Raises VL2Error for a bundle that engines cannot be built of and a context that the model does not have."""
    model = planned_model(bundle)
    if model.storage is None or model.storage.lowering != _LOWERING:
        found = "is no bundle" if model.storage is None else f"has the lowering `{model.storage.lowering}`"
        raise VL2Error(
            f"{bundle} {found}, and engines are built of the lowering `{_LOWERING}`",
            f"vl2 export CHECKPOINT --lowering {_LOWERING} --out BUNDLE",
        )
    size = prompt_size(model, Demand(_IMAGES, context=context, prefill_chunk=prefill_chunk))
    memory = run_memory(model, model.storage, size, "engine", target.memory == "shared")
    return EngineFit(memory, build_bytes(model, model.storage), int(target.usable_bytes))


def check_fit(fit: EngineFit, name: str, built_there: bool) -> None:
    """Raises VL2Error where a run does not fit, or a build that has to be done on the target."""
    if fit.run.peak > fit.usable:
        cache = replace(fit.run, kv_cache=0).peak
        mend = (
            "a smaller --context would fit"
            if cache <= fit.usable
            else "quantize further (`vl2 plan CHECKPOINT --target` says how far), or take another target"
        )
        raise VL2Error(
            f"a run on {name} needs {fit.run.peak / 1e9:.2f} GB (weights {fit.run.weights / 1e9:.2f}, cache "
            f"{fit.run.kv_cache / 1e9:.2f}), and {fit.usable / 1e9:.2f} GB are usable there",
            mend,
        )
    if built_there and fit.build > fit.usable:
        raise VL2Error(
            f"building on {name} needs about {fit.build / 1e9:.2f} GB, and {fit.usable / 1e9:.2f} GB are usable there",
            "add swap, or take a target with more memory",
        )

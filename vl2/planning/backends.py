"""Which backends of a target run a model, with which lowering, and how engines store it."""

from __future__ import annotations

from dataclasses import replace

from vl2.errors import VL2Error
from vl2.planning.models import PlannedModel
from vl2.planning.schemes import CPU, ORT, Storage, form_of_checkpoint
from vl2.planning.targets import Target
from vl2.quantization import Form

# By the lowering of a bundle; the others have standard operators or onnxruntime's own.
_RUN_BY = {CPU: ("cpu",), "trt": ("engine",)}
_RUN_BY_ONNXRUNTIME = ("cpu", "cuda")
_TOWER = ("vision", "projector")
_HALF_BYTES = 2
_ROW_WISE = Form(8, None)


def default_lowering(target: Target) -> str:
    """Of packed weights, as `vl2 export` chooses on the target itself."""
    return CPU if target.backends[0] == "cpu" else ORT


def backends_of(model: PlannedModel, name: str, target: Target) -> tuple[str, ...]:
    """Those of the target `name` that run the model: of a bundle the ones that its lowering is for.

    Raises VL2Error where there is none.
    """
    if not model.is_bundle:
        return target.backends
    wanted = _RUN_BY.get(model.storage.lowering, _RUN_BY_ONNXRUNTIME)
    found = tuple(backend for backend in target.backends if backend in wanted)
    if not found:
        lowering = f"the lowering `{model.storage.lowering}`, which runs on {' and '.join(wanted)}"
        raise VL2Error(f"`{model.name}` has {lowering}, and {name} has {', '.join(target.backends)}",
                       "export the checkpoint with another --lowering")
    return found


def on_engines(model: PlannedModel, storage: Storage) -> Storage:
    """The storage as engines have it: the tower in float16, or in INT8 where that has one scale a row."""
    if model.is_bundle:
        return storage
    halves = dict.fromkeys(_TOWER, 0)
    for tensor in model.tensors:
        if tensor.module in halves:
            halves[tensor.module] += _HALF_BYTES * tensor.parameters
    if _tower_forms(model) <= {None, _ROW_WISE}:
        halves = {module: min(size, storage.modules.get(module, size)) for module, size in halves.items()}
    return replace(storage, modules={**storage.modules, **halves})


def _tower_forms(model: PlannedModel) -> set[Form | None]:
    """Of a quantized checkpoint's tower; schemes that are still to be chosen quantize rows."""
    if model.config.quantization_config is None:
        return set()
    form_of = form_of_checkpoint(model.config)
    return {form_of(tensor) for tensor in model.tensors if tensor.module in _TOWER}

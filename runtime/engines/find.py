"""Which engines of a bundle run on this machine, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl2.backends import ENGINES_OF
from vl2.engine_record import EngineHost, EngineRecord, check_engines
from vl2.errors import VL2Error
from vl2.manifest import Manifest
from vl2.plugins.tensorrt.flavour import load_tensorrt
from vl2.plugins.tensorrt.sources import plugin_hash
from vl2.runtime.engines.device import Device, open_device

_WITHOUT = "export the checkpoint without --lowering trt"


@dataclass(frozen=True)
class FoundEngines:
    """Engines that run here: what runs them, and why those of a faster backend do not (or nothing)."""

    target: str
    record: EngineRecord
    trt: Any
    device: Device
    note: str = ""


def find_engines(folder: Path, manifest: Manifest, backends: Sequence[str]) -> FoundEngines:
    """The first engines of these backends that fit TensorRT, GPU and plugins of this machine; no engine is read.

    Raises VL2Error telling why there are none.
    """
    if not manifest.engines:
        raise VL2Error(f"{folder} has the lowering `{manifest.lowering}`, which engines alone run, and none were built",
                       f"`vl2 engine {folder} --target local` builds them for this machine's GPU, another --target for "
                       f"a device of `vl2 plan --list-targets`; without a GPU {_WITHOUT}")
    built = {record.backend for record in manifest.engines.values()}
    # of several backends only those that the bundle has engines of have something to tell
    asked = [backend for backend in backends if len(backends) == 1 or ENGINES_OF[backend] in built]
    reasons: list[tuple[str, VL2Error]] = []
    for backend in asked:
        try:
            target, record, trt, device = _of_backend(folder, manifest, ENGINES_OF[backend])
        except VL2Error as error:
            reasons.append((backend, error))
            continue
        note = "; ".join(f"not {name}: {why.message}" for name, why in reasons)
        return FoundEngines(target, record, trt, device, note)
    told = [f"{name}: {why.message}" if len(reasons) > 1 else why.message for name, why in reasons]
    raise VL2Error(f"no engines of {folder} run here: {'; '.join(told)}", reasons[0][1].hint)


def _of_backend(folder: Path, manifest: Manifest, flavour: str) -> tuple[str, EngineRecord, Any, Device]:
    records = {target: record for target, record in manifest.engines.items() if record.backend == flavour}
    if not records:
        held = ", ".join(f"{target} ({record.backend})" for target, record in manifest.engines.items())
        raise VL2Error(f"there are none of {flavour}, it has those for {held}",
                       f"`vl2 engine {folder} --target local --backend {flavour}` builds them for this machine's GPU")
    trt, device = load_tensorrt(flavour), open_device()
    host = EngineHost(flavour, trt.__version__, device.compute_capability, plugin_hash())
    errors = []
    for target, record in records.items():
        try:
            check_engines(target, record, host)
        except VL2Error as error:
            errors.append(error)
            continue
        return target, record, trt, device
    raise VL2Error("; ".join(error.message for error in errors), errors[0].hint)

"""Which backend runs a bundle here: the one that was asked for, or the fastest that works; no other in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vl2.backends import AUTO, ENGINE_LOWERING, ENGINES_OF
from vl2.errors import VL2Error
from vl2.manifest import Manifest
from vl2.runtime.backend import Backend
from vl2.runtime.options import BundleOptions
from vl2.runtime.ort import OrtBackend


def choose_backend(folder: Path, manifest: Manifest, options: BundleOptions) -> Callable[[], Backend]:
    """What makes the backend, for when everything else is checked. Reads no weight.

    auto: of a bundle for engines those that fit this machine, else onnxruntime, on CUDA where that works. Raises
    VL2Error where what was asked for cannot run the bundle here, or nothing can.
    """
    wanted = options.wanted
    if manifest.lowering == ENGINE_LOWERING and wanted in (AUTO, *ENGINES_OF):
        # only here: who runs no engines needs nothing of theirs
        from vl2.runtime.engines.backend import EngineBackend
        from vl2.runtime.engines.find import find_engines

        found = find_engines(folder, manifest, tuple(ENGINES_OF) if wanted == AUTO else (wanted,))
        return lambda: EngineBackend(folder, manifest, found, options)
    if manifest.lowering == ENGINE_LOWERING:
        raise VL2Error(f"{folder} has the lowering `trt`, which engines alone run, and {wanted} was asked for",
                       "leave --backend and --device out, or export the checkpoint without --lowering trt")
    if wanted in ENGINES_OF:
        raise VL2Error(f"{wanted} was asked for, and {folder} has the lowering `{manifest.lowering}`, of which no "
                       "engines are built",
                       "`vl2 export CHECKPOINT --lowering trt --out BUNDLE`, then `vl2 engine BUNDLE --target NAME`")
    return lambda: OrtBackend(folder, manifest, options, _why_no_engines(manifest, wanted))


def _why_no_engines(manifest: Manifest, wanted: str) -> str:
    """Said where a TensorRT is installed, so that engines were to be thought of."""
    from vl2.plugins.tensorrt.flavour import is_installed

    thought_of = wanted == AUTO and any(map(is_installed, ENGINES_OF.values()))
    return f"not engines: the bundle has the lowering {manifest.lowering}" if thought_of else ""

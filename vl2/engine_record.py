"""What a bundle's manifest says of the engines of one target, and whether they run somewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vl2.errors import VL2Error


@dataclass(frozen=True)
class EngineRecord:
    """backend: `tensorrt` or `tensorrt-rtx`, version: its own; kernels: sha256 of the plugins' sources
    (`vl2.plugins.tensorrt.sources`); sizes: largest context, prefill_chunk and tiles; profiles: by graph, shape ranges
    by input; files, builds: by graph."""

    backend: str
    version: str
    compute_capability: str
    kernels: str
    sizes: dict[str, int]
    profiles: dict[str, Any]
    files: dict[str, str]
    builds: dict[str, dict[str, float]]


@dataclass(frozen=True)
class EngineHost:
    """What would run an engine: the TensorRT that is installed, the GPU, and the plugins of this vl2."""

    backend: str
    version: str
    compute_capability: str
    kernels: str


def written_name(cache: str) -> str:
    """The output that a cache is after a step, at the address of the input `cache`."""
    return f"written_{cache}"


def check_engines(target: str, record: EngineRecord, host: EngineHost) -> None:
    """Raises VL2Error unless engines of this record run on this host: an engine is for one GPU and one version."""
    facts = (("backend", record.backend, host.backend), ("version", record.version, host.version),
             ("compute capability", record.compute_capability, host.compute_capability))
    for what, built, here in facts:
        if built != here:
            again = f"build them again: `vl2 engine BUNDLE --target {target} --force`"
            other = f"build engines for this GPU: `vl2 engine BUNDLE --target local --backend {host.backend}`"
            raise VL2Error(f"the engines for {target} were built for {what} {built}, and here it is {here}",
                           other if what == "compute capability" else again)
    if record.kernels != host.kernels:
        raise VL2Error(f"the engines for {target} need plugins of the sources {record.kernels[:12]}, and this vl2 has "
                       f"{host.kernels[:12]}", f"build them again: `vl2 engine BUNDLE --target {target} --force`")

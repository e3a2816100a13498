"""Devices as data: memory, bandwidth and what runs there. `targets.json` ships with vl2, users add files of their own.

cpu_gflops is the rate of large float32 matrix products, 0.8 of the cores' peak in the shipped table. fp16_tflops is
the tensor cores' dense rate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vl2.errors import VL2Error
from vl2.json_file import from_json, read_json

LOCAL = ("local", "local-gpu")
# cpu: onnxruntime on the CPU; cuda: onnxruntime-gpu; engine: TensorRT or TensorRT-RTX.
BACKENDS = ("cpu", "cuda", "engine")
_RTX = "TensorRT-RTX"
_MEMORIES = ("shared", "dedicated", "host")
_SHIPPED = Path(__file__).with_name("targets.json")
_GIB = 1 << 30


@dataclass(frozen=True)
class Target:
    """One device.

    memory: "shared" by CPU and GPU, "dedicated" to a GPU, or "host" where there is no GPU; usable_share: of it, what a
    program can have beside system and desktop. source: where the figures are from. jetpack, tensorrt: versions for it;
    one that begins with TensorRT-RTX makes that its backend for engines.
    """

    description: str
    memory: str
    memory_gib: float
    bandwidth_gb_s: float
    usable_share: float
    backends: tuple[str, ...]
    source: str
    compute_capability: str | None = None
    fp16_tflops: float | None = None
    cpu_gflops: float | None = None
    jetpack: tuple[str, ...] = ()
    tensorrt: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _expect(self.memory in _MEMORIES, "memory", self.memory, f"one of {', '.join(_MEMORIES)}")
        _expect(self.memory_gib > 0, "memory_gib", self.memory_gib, "more than 0")
        _expect(self.bandwidth_gb_s > 0, "bandwidth_gb_s", self.bandwidth_gb_s, "more than 0")
        _expect(0 < self.usable_share <= 1, "usable_share", self.usable_share, "more than 0, at most 1")
        known = bool(self.backends) and set(self.backends) <= set(BACKENDS)
        _expect(known, "backends", self.backends, f"one or more of {', '.join(BACKENDS)}")
        _expect("cpu" not in self.backends or self.cpu_gflops, "cpu_gflops", self.cpu_gflops, "a rate, as cpu runs")
        on_gpu = "cuda" in self.backends or "engine" in self.backends
        _expect(not on_gpu or self.fp16_tflops, "fp16_tflops", self.fp16_tflops, "a rate, as cuda or engine runs")
        capability = self.compute_capability
        known = capability is None or re.fullmatch(r"\d+\.\d", capability)
        _expect(known, "compute_capability", capability, "two numbers such as 8.7")

    @property
    def engine_backend(self) -> str | None:
        """Which TensorRT builds for it: `tensorrt-rtx` where its `tensorrt` names TensorRT-RTX, else `tensorrt`."""
        if "engine" not in self.backends:
            return None
        return "tensorrt-rtx" if any(version.startswith(_RTX) for version in self.tensorrt) else "tensorrt"

    @property
    def usable_bytes(self) -> float:
        """Memory that a run may take."""
        return self.memory_gib * _GIB * self.usable_share


def read_targets(path: Path | None = None) -> dict[str, Target]:
    """The shipped targets and, over them, those of a user's file. Raises VL2Error naming the key that is wrong."""
    targets = _read(_SHIPPED)
    return targets if path is None else targets | _read(path)


def _read(path: Path) -> dict[str, Target]:
    targets = {}
    for name, values in read_json(path).items():
        if name in LOCAL:
            raise VL2Error(f"{path}: the name {name!r} stands for this machine, measured", "choose another name")
        try:
            targets[name] = from_json(Target, values, name)
        except VL2Error as error:
            raise VL2Error(f"{path}: {error.message}", error.hint) from error
    return targets


def target_named(name: str, targets: Mapping[str, Target]) -> Target:
    """Raises VL2Error listing the names when there is none of this one."""
    if name not in targets:
        raise VL2Error(f"there is no target `{name}`, expected one of {', '.join((*LOCAL, *targets))}",
                       "or describe it in a file like vl2/planning/targets.json and give it with --targets")
    return targets[name]


def _expect(holds: object, name: str, value: object, expected: str) -> None:
    if not holds:
        raise VL2Error(f"{name} is {value!r}, expected {expected}")

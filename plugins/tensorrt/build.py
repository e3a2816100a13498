"""Builds one engine from one ONNX file, in a process of its own: its memory is freed, its peak measured, and a library
that ends the process ends no more than this.

    python -m vl2.plugins.tensorrt.build < job.json > facts.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vl2.errors import VL2Error
from vl2.plugins.tensorrt.flavour import RTX, library_environment, load_tensorrt, logger_of
from vl2.plugins.tensorrt.plugin import load_plugins, register_plugins, told_by

_GPUS = "TensorRT-RTX is for GeForce and RTX GPUs from 7.5 on; Jetson boards take TensorRT, on the board"
_EXPORT = "export the bundle again with this vl2"
# Smallest, usual and largest shape of an input.
Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class EngineJob:
    """onnx, out: paths; capabilities: compute capabilities such as "8.6" for TensorRT-RTX, none for TensorRT; profiles:
    of each, the ranges of the inputs with dynamic sides; on_this_gpu: whether the capability is of the GPU here;
    plugin_library: the C++ host (`vl2.plugins.tensorrt.host`) in the place of the Python one."""

    onnx: str
    out: str
    flavour: str
    capabilities: tuple[str, ...] = ()
    profiles: tuple[dict[str, Range], ...] = ()
    on_this_gpu: bool = False
    plugin_library: str = ""


@dataclass(frozen=True)
class EngineFacts:
    """What a build was: seconds with parsing, peak memory of the process, size of the engine."""

    tensorrt: str
    size_bytes: int
    seconds: float
    peak_rss_bytes: int
    layers: int = 0
    warnings: tuple[str, ...] = field(default=())


def build_apart(job: EngineJob) -> EngineFacts:
    """Builds in another process. Raises VL2Error with TensorRT's own words."""
    with tempfile.TemporaryDirectory(prefix="vl2-engine-") as folder:
        environment = library_environment(job.flavour, Path(folder))
        done = subprocess.run([sys.executable, "-m", __name__], input=json.dumps(asdict(job)), text=True,
                              capture_output=True, env=environment)  # fmt: skip
    if done.returncode == 0:
        facts = json.loads(done.stdout)
        return EngineFacts(**{**facts, "warnings": tuple(facts["warnings"])})
    try:
        told = json.loads(done.stdout)
    except ValueError:
        said = (done.stderr or done.stdout).strip()[-2000:] or f"signal {-done.returncode}"
        raise VL2Error(f"{job.flavour} ended while it built {job.onnx}: {said}",
                       "if it is memory, close other programs; `vl2 doctor` checks the installation") from None
    raise VL2Error(told["message"], told["hint"])


def build(job: EngineJob) -> EngineFacts:
    """Builds in this process. Raises VL2Error."""
    start, trt = time.monotonic(), load_tensorrt(job.flavour)
    logger, refused = logger_of(trt), _register(trt, job)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.onnx):
        said = [parser.get_error(number).desc() for number in range(parser.num_errors)]
        raise _refusal(job, "does not parse", refused(), [*logger.errors, *said])
    config = _config(trt, builder, job, logger)
    plan = builder.build_serialized_network(network, config)
    if plan is None or refused():
        raise _refusal(job, "cannot build", refused(), logger.errors, _hint(job))
    _write(Path(job.out), plan)
    seconds = round(time.monotonic() - start, 2)
    said = tuple(logger.warnings[:20])
    return EngineFacts(trt.__version__, plan.nbytes, seconds, _peak_bytes(), network.num_layers, said)


def _register(trt: Any, job: EngineJob) -> Callable[[], list[VL2Error]]:
    """Plugins of the host that the job names, and a function that says what they have refused."""
    if job.plugin_library:
        load_plugins(trt, job.plugin_library)
        return lambda: told_by(job.plugin_library)
    refused: list[VL2Error] = []
    register_plugins(trt, refused)
    return lambda: refused


def _peak_bytes() -> int:
    """Largest resident size of this program; ru_maxrss would begin at that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def _config(trt: Any, builder: Any, job: EngineJob, logger: Any) -> Any:
    config = builder.create_builder_config()
    # caches are outputs at their inputs' addresses
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if (captured := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
        # TensorRT-RTX allocates while it runs otherwise, where tensors are large, and then no step can be captured
        config.set_flag(captured)
    for ranges in job.profiles:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in ranges.items():
            profile.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
        config.add_optimization_profile(profile)
    if job.flavour == RTX and job.capabilities:
        config.num_compute_capabilities = len(job.capabilities)
        for number, name in enumerate(job.capabilities):
            if not config.set_compute_capability(_capability(trt, name, job.on_this_gpu), number):
                said = "; ".join(logger.errors[:6]) or "no reason was given"
                raise VL2Error(f"TensorRT-RTX {trt.__version__} takes no compute capability {name}: {said}", _GPUS)
    return config


def _capability(trt: Any, name: str, on_this_gpu: bool) -> Any:
    """The GPU of this machine without a name of its own is CURRENT; TensorRT-RTX says whether it builds for it."""
    known = getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}", None)
    if known is None and on_this_gpu:
        return trt.ComputeCapability.CURRENT
    if known is None:
        raise VL2Error(f"TensorRT-RTX {trt.__version__} builds no engine for compute capability {name}", _GPUS)
    return known


def _hint(job: EngineJob) -> str:
    return _GPUS if job.flavour == RTX and job.on_this_gpu else _EXPORT


def _refusal(job: EngineJob, what: str, refused: list[VL2Error], said: list[str], hint: str = _EXPORT) -> VL2Error:
    """Our plugins' words go first: TensorRT only says that there was an exception."""
    if refused:
        return VL2Error(f"{job.flavour} {what} {job.onnx}: {refused[0].message}", refused[0].hint)
    text = "; ".join(said[:6]) or "no reason was given"
    return VL2Error(f"{job.flavour} {what} {job.onnx}: {text}", hint)


def _write(path: Path, plan: Any) -> None:
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("wb") as stream:
        stream.write(memoryview(plan))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, path)


def main() -> int:
    """The process of `build_apart`: facts or an error as JSON on standard output."""
    # TensorRT and plugins print; standard output belongs to the answer
    answer, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    try:
        facts, code = asdict(build(EngineJob(**json.load(sys.stdin)))), 0
    except VL2Error as error:
        facts, code = {"message": error.message, "hint": error.hint}, 1
    with answer:
        json.dump(facts, answer)
    return code


if __name__ == "__main__":
    sys.exit(main())

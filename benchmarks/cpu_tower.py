"""The full-size vision tower and projector on a CPU beside its peers, one tile of 384×384.

    python benchmarks/cpu_tower.py --work DIR [--threads 2] [--rounds 3] [--tiles 1] [--openvino-python PYTHON]
    python benchmarks/cpu_tower.py --work DIR --profile

Random INT8 weights, one scale a row; the peers' float32 graph has the same numbers, dequantized, and results are
compared before anything is timed. Each candidate is a process that stays; a round asks each once, so that a noisy
machine meets all of them. The table has medians over the rounds, wall and processor time. PYTHON has openvino
installed. `--profile` shows where the time of ours goes, by operator.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
FLOATS, QUANTIZED = "tower-fp32.onnx", "tower-int8-dynamic.onnx"


@dataclass(frozen=True)
class Candidate:
    """One way to compute the tower. kind: a key of RUNNERS; bound: RMS difference from float32 that it may have."""

    name: str
    kind: str
    model: str
    bound: float
    isa: str | None = None


CANDIDATES = (
    Candidate("vl2 exact", "onnxruntime", "tower-exact.onnx", 1e-4),
    Candidate("vl2 fast", "onnxruntime", "tower-fast.onnx", 5e-2),
    Candidate("vl2 exact, avx512vnni", "onnxruntime", "tower-exact.onnx", 1e-4, "avx512vnni"),
    Candidate("vl2 fast, avx512vnni", "onnxruntime", "tower-fast.onnx", 5e-2, "avx512vnni"),
    Candidate("ONNX Runtime fp32", "onnxruntime", FLOATS, 1e-4),
    Candidate("ONNX Runtime INT8 dynamic", "onnxruntime", QUANTIZED, 0.5),
    Candidate("OpenVINO fp32", "openvino f32", FLOATS, 1e-4),
    Candidate("OpenVINO, its own choice (bf16)", "openvino", FLOATS, 0.1),
)


def matrix(name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """INT8 codes and float16 scales of a random matrix of unit gain, the same whenever it is asked for."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    scales = ((rng.random((shape[0], 1), np.float32) + 0.5) * shape[1] ** -0.5 / 74).astype(np.float16)
    return rng.integers(-127, 128, shape, np.int8), scales


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of a parameter: ones for norms, small for biases, all else random and of float16's precision."""
    if len(shape) == 2:
        codes, scales = matrix(name, shape)
        return codes * scales.astype(np.float32)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
        return (drawn * np.float32(np.prod(shape[1:]) ** -0.5)).astype(np.float16).astype(np.float32)
    return np.ones(shape, np.float32) if "norm" in name and name.endswith("weight") else drawn * np.float32(0.02)


def write_models(work: Path) -> None:
    """The graphs as `vl2 export` makes them, and their weights; those that are there stay."""
    from vl2.config import load_config
    from vl2.export.storing import CPU, PORTABLE
    from vl2.quantization import Form

    folder = work / "config"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text((GOLDENS / "published" / "tiny.config.json").read_text())
    config = load_config(folder)
    for mode, lowering, scheme in (("exact", CPU, "fp16"), ("fast", CPU, "fp16"), ("fp32", PORTABLE, "fp32")):
        path = work / f"tower-{mode}.onnx"
        if not path.exists():
            write_model(path, config, (lowering, scheme, mode, Form(8, None)))
    if not (work / QUANTIZED).exists():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(work / FLOATS, work / QUANTIZED, weight_type=QuantType.QInt8, use_external_data_format=True)


def write_model(path: Path, config, choice: tuple) -> None:
    """One graph with its data file beside it. choice: lowering, scheme, mode, form of the matrices."""
    import onnx_ir as ir

    from vl2.export.passes.store_weights import DataFile
    from vl2.export.schemes import FLOAT16
    from vl2.export.storing import CPU, Storing
    from vl2.export.to_onnx import build_graph
    from vl2.model.checkpoint import parameter_shapes

    lowering, scheme, mode, form = choice
    shapes = parameter_shapes(config)
    ours = [name for name in shapes if name.startswith(("vision.", "projector."))]
    packed = {name: form for name in ours if len(shapes[name]) == 2}
    forms, scales = (packed, dict.fromkeys(packed, FLOAT16)) if lowering == CPU else ({}, {})
    storing = Storing(scheme, lowering, shapes, forms, scales, "fp32" if lowering == CPU else None, mode)
    data = DataFile(path.with_suffix(".data").name, storing)
    model, placed = build_graph("vision", config, data)
    with (path.parent / data.name).open("wb") as file:
        for place in placed:
            file.seek(place.offset)
            file.write(stored(place, shapes[place.weight.parameter]))
    ir.save(model, path)


def stored(place, shape: tuple[int, ...]) -> bytes:
    """The bytes of a weight as its graph reads them."""
    import torch

    from vl2.export.native_storage import NativeStorage
    from vl2.export.weights import arrange
    from vl2.plugins.native.layout import pack

    name = place.weight.parameter
    if isinstance(place.storage, NativeStorage):
        return pack(place.storage.layout, *matrix(name, shape)).tobytes()
    tensor = arrange(torch.from_numpy(numbers(name, shape)), place.weight.layout)
    return tensor.to(place.storage.torch_dtype).contiguous().numpy().tobytes()


def onnxruntime_runner(path: Path, threads: int, _: str) -> Callable[[np.ndarray], np.ndarray]:
    """onnxruntime, with our library where the graph wants it."""
    import onnxruntime

    from vl2.operators import library_path

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library_path()[0]))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda tiles: session.run(None, {"tiles": tiles})[0]


def openvino_runner(path: Path, threads: int, precision: str) -> Callable[[np.ndarray], np.ndarray]:
    """OpenVINO; precision f32, or what it takes by itself."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda tiles: next(iter(compiled(tiles).values()))


RUNNERS = {"onnxruntime": onnxruntime_runner, "openvino": openvino_runner}


def tiles_of(count: int) -> np.ndarray:
    """Random pixels."""
    return np.random.default_rng(0).standard_normal((count, 3, 384, 384), np.float32)


def serve(work: Path, name: str, threads: int, count: int) -> None:
    """A candidate's process: one run for each line that comes, its seconds and processor seconds in return."""
    candidate = next(c for c in CANDIDATES if c.name == name)
    kind, _, precision = candidate.kind.partition(" ")
    run, tiles = RUNNERS[kind](work / candidate.model, threads, precision), tiles_of(count)
    np.save(work / f"{os.getpid()}.npy", run(tiles))
    print(os.getpid(), flush=True)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        run(tiles)
        print(json.dumps([time.perf_counter() - wall, time.process_time() - processor]), flush=True)


def start(candidate: Candidate, options: argparse.Namespace) -> tuple[subprocess.Popen, np.ndarray]:
    """The process of a candidate, ready, and what it computed."""
    python = options.openvino_python if candidate.kind.startswith("openvino") else sys.executable
    command = [python, __file__, "--work", options.work, "--serve", candidate.name, "--threads", str(options.threads),
               "--tiles", str(options.tiles)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    if candidate.isa:
        environment["VL2_CPU_ISA"] = candidate.isa
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    file = options.work / f"{child.stdout.readline().strip()}.npy"
    result = np.load(file)
    file.unlink()
    return child, result


def ask(child: subprocess.Popen) -> list[float]:
    """One run's wall and processor seconds."""
    child.stdin.write("\n")
    child.stdin.flush()
    return json.loads(child.stdout.readline())


def compare(options: argparse.Namespace) -> None:
    """Starts all, compares what they compute, runs the rounds and prints the table."""
    chosen = [c for c in CANDIDATES if (options.openvino_python or not c.kind.startswith("openvino"))
              and (not options.only or any(part in c.name for part in options.only.split(",")))]  # fmt: skip
    started = {candidate: start(candidate, options) for candidate in chosen}
    want = next((y for c, (_, y) in started.items() if c.name == "ONNX Runtime fp32"), next(iter(started.values()))[1])
    errors = {c: float(np.sqrt(np.mean((y - want) ** 2) / np.mean(want**2))) for c, (_, y) in started.items()}
    seconds: dict[Candidate, list] = {candidate: [] for candidate in chosen}
    for _ in range(options.rounds):
        for candidate, (child, _) in started.items():
            seconds[candidate].append(ask(child))
    for child, _ in started.values():
        child.stdin.close()
        child.wait()
    print(f"{options.tiles} tile(s), {options.threads} thread(s), medians of {options.rounds} rounds\n")
    print("| | s a tile | best | processor s a tile | of ONNX Runtime fp32 | RMS difference |")
    print("|---|---|---|---|---|---|")
    walls = {c: statistics.median(wall for wall, _ in runs) / options.tiles for c, runs in seconds.items()}
    base = next((wall for c, wall in walls.items() if c.name == "ONNX Runtime fp32"), None)
    for candidate, runs in seconds.items():
        best, processor = min(wall for wall, _ in runs), statistics.median(cpu for _, cpu in runs)
        share = f"{walls[candidate] / base:.2f}" if base else "–"
        figures = (walls[candidate], best / options.tiles, processor / options.tiles)
        cells = " | ".join(f"{figure:.2f}" for figure in figures)
        print(f"| {candidate.name} | {cells} | {share} | {errors[candidate]:.1e} |", flush=True)
    late = [f"{c.name}: {errors[c]:.2g} of the RMS, bound {c.bound}" for c in chosen if errors[c] > c.bound]
    if late:
        sys.exit("other results than ONNX Runtime's in float32: " + "; ".join(late))


def profile(options: argparse.Namespace) -> None:
    """Milliseconds of one run by operator, from onnxruntime's profiler, a thread at a time less what waits."""
    import onnxruntime

    from vl2.operators import library_path

    for name in ("tower-exact.onnx", "tower-fast.onnx"):
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.enable_profiling = options.threads, True
        settings.profile_file_prefix = str(options.work / "profile")
        settings.register_custom_ops_library(str(library_path()[0]))
        session = onnxruntime.InferenceSession(str(options.work / name), settings)
        for _ in range(options.rounds):
            session.run(None, {"tiles": tiles_of(options.tiles)})
        times: dict[str, float] = collections.Counter()
        for event in json.loads(Path(session.end_profiling()).read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                times[event["args"]["op_name"]] += event["dur"] / 1e3 / options.rounds
        print(name, ", ".join(f"{op} {ms:.0f} ms" for op, ms in times.most_common(9)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=1)
    parser.add_argument("--openvino-python")
    parser.add_argument("--only", help="parts of candidates' names, by commas")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.work, options.serve, options.threads, options.tiles)
        return
    write_models(options.work)
    (profile if options.profile else compare)(options)


if __name__ == "__main__":
    main()

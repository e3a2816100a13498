"""Every check of docs/gpu-checks.md that this machine can run: a table, then one JSON line; exit 1 if one failed.

    python benchmarks/gpu_checks.py [--only kernels] [--list] [--logs FOLDER]

Each check is a command or two of its own process, whose output goes to FOLDER; what a check needs and the machine lacks
is named, and the check is skipped. vl2 has to be installed with its extras [export] and, for engines, [engine].
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
VL2 = (str(Path(sys.executable).with_name("vl2")),)  # not `-c`, which takes the sources of this folder
IMAGE, QUESTION = str(ROOT / "nano" / "demo.png"), "What is the total?"
HELD_OUT = str(ROOT / "nano" / "heldout" / "heldout.jsonl")
# The CUDA provider multiplies INT4 matrices by MatMulNBits, which only this lowering has.
INT4 = ("--scheme", "int4", "--lowering", "ort", "--no-verify")
LONGEST_SECONDS = 540


class Failure(Exception):
    """What a check found wrong."""


@dataclass
class Run:
    """Where checks work and write. folder: bundles; log: of the check that runs."""

    folder: Path
    log: Path

    def command(self, *words: str | Path, env: dict[str, str] | None = None) -> str:
        """Its standard output. Raises Failure where it ends with another code than 0 or not in time."""
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(map(str, words))}\n")
            log.flush()
            try:
                done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, stderr=log, text=True,
                                      cwd=BENCHMARKS, env={**os.environ, **(env or {})}, timeout=LONGEST_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise Failure(f"took longer than {LONGEST_SECONDS} s") from error
            log.write(done.stdout)
        if done.returncode:
            raise Failure(f"exit code {done.returncode}: {_last_line(self.log)}")
        return done.stdout

    def script(self, name: str, *words: str) -> dict:
        """The JSON line of a benchmark."""
        return _json(self.command(sys.executable, BENCHMARKS / name, *words))

    def answer(self, bundle: Path, backend: str, *words: str) -> dict:
        """`vl2 run --json` on the demo's image."""
        return json.loads(self.command(*VL2, "run", bundle, "--backend", backend, "--image", IMAGE, "--prompt",
                                       QUESTION, "--json", *words))

    def bundle(self, name: str, *words: str) -> Path:
        """vl2-nano exported, once."""
        path = self.folder / name
        if not path.exists():
            self.command(*VL2, "export", ROOT / "nano" / "checkpoint", "--out", path, *words)
        return path

    def engines(self) -> Path:
        """vl2-nano with engines for this machine's GPU."""
        path = self.bundle("nano-trt.bundle", "--lowering", "trt", "--no-verify")
        if not json.loads((path / "manifest.json").read_text()).get("engines"):
            self.command(*VL2, "engine", path, "--target", "local", "--backend", "tensorrt-rtx")
        return path


def _json(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _same(found: dict, wanted: dict, what: str) -> None:
    if found["token_ids"] != wanted["token_ids"]:
        raise Failure(f"{what} says {found['text']!r}, the CPU {wanted['text']!r}")


def kernels(run: Run) -> dict:
    """Every kernel against float64, and its rate."""
    found = run.script("gpu_kernels.py")
    shares = {row["case"]: round(row["share"], 3) for row in found["rows"] if row["case"].endswith("× 1")}
    return {"cases": len(found["rows"]), "copy_gb_per_s": found["copy_bytes_per_s"] / 1e9, "decode_shares": shares}


def peers(run: Run) -> dict:
    """What PyTorch reaches at the same problems."""
    found = run.script("gpu_peers.py")
    rows = {row["case"]: [round(row[f"{kind}_times"], 2) for kind in ("eager", "compiled")] for row in found["rows"]}
    return {"bf16_tflops": found["bf16_flops_per_s"] / 1e12, "eager_and_compiled_over_ours": rows}


def step(run: Run) -> dict:
    """The kernels of a whole decode step in one graph."""
    return {row["decoder"]: {"tokens_per_second": row["tokens_per_second"], "share_of_limit": row["share_of_limit"]}
            for row in run.script("gpu_step.py")["rows"]}


def sanitizers(run: Run) -> dict:
    """No races, no stray accesses."""
    script = (sys.executable, BENCHMARKS / "gpu_kernels.py", "--rounds", "1", "--only")
    for tool in ("racecheck", "memcheck"):
        for cases in ("mini", "nano"):
            run.command("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *script, cases)
    return {}


def engine(run: Run) -> dict:
    """Engines answer as the CPU, with and without CUDA graphs."""
    wanted = run.answer(run.bundle("nano.bundle"), "ort-cpu")
    bundle = run.engines()
    graphs, plain = run.answer(bundle, "trt-rtx"), run.answer(bundle, "trt-rtx", "--no-cuda-graph")
    _same(graphs, wanted, "the engine")
    _same(plain, wanted, "the engine without CUDA graphs")
    return {kind: {"tokens_per_second": found["tokens_per_second"], "prefill_ms": found["prefill_ms"]}
            for kind, found in (("graphs", graphs), ("plain", plain))}


def engine_answers(run: Run) -> dict:
    """Engines over many questions beside the CPU."""
    out = run.folder / "compare"
    run.command(*VL2, "compare", run.bundle("nano.bundle"), run.engines(), "--data", HELD_OUT, "--limit", "60", "--out",
                out, "--force")
    return {"report": str(out)}


def engine_rate(run: Run) -> dict:
    """Decode rate of engines, with and without CUDA graphs."""
    return {name: _json(run.command(*VL2, "bench", run.engines(), "--new-tokens", "256", *words))
            for name, words in (("graphs", ()), ("plain", ("--no-cuda-graph",)))}


def onnxruntime_cuda(run: Run) -> dict:
    """Bundles of ONNX Runtime's own operators, float16 and INT4, answer on its CUDA provider as on the CPU."""
    found, out = {}, run.folder / "compare-cuda"
    for name, words in (("nano.bundle", ()), ("nano-int4.bundle", INT4)):
        bundle = run.bundle(name, *words)
        answer = run.answer(bundle, "ort-cuda")
        _same(answer, run.answer(bundle, "ort-cpu"), f"{name} on CUDA")
        found[name] = answer["tokens_per_second"]
    run.command(*VL2, "compare", run.folder / "nano.bundle", run.folder / "nano-int4.bundle", "--backend", "ort-cuda",
                "--data", HELD_OUT, "--limit", "60", "--out", out, "--force")
    return found | {"report": str(out)}


def training(run: Run) -> dict:
    """vl2-nano from nothing in seven minutes, and what it answers; the checkpoint stays in the folder."""
    out = run.folder / "nano-run"
    run.command(sys.executable, "-m", "vl2.nano.train", "--device", "cuda", "--out", out, "--minutes", "7",
                "--batch-scale", "4", "--workers", str(max(1, (os.cpu_count() or 2) - 4)), "--tower-steps", "500",
                "--easy-steps", "120", "--dense-every", "3")
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    scores = _json(run.command(sys.executable, "-m", "vl2.nano.evaluate", out / "checkpoint", "--data", HELD_OUT))
    return {"pages": last["pages"], "pages_per_second": last["pages_per_second"], "scores": scores}


def _module(name: str, how: str) -> Callable[[], str]:
    return lambda: "" if importlib.util.find_spec(name) else f"{name} is not installed ({how})"


def _torch_cuda() -> str:
    if missing := _module("torch", "its CUDA build")():
        return missing
    import torch

    return "" if torch.cuda.is_available() else "this torch sees no GPU"


def _tool(name: str) -> Callable[[], str]:
    return lambda: "" if shutil.which(name) else f"{name} is not on the PATH"


def _cuda_provider() -> str:
    if missing := _module("onnxruntime", "pip install onnxruntime-gpu")():
        return missing
    import onnxruntime

    found = onnxruntime.get_available_providers()
    return "" if "CUDAExecutionProvider" in found else f"onnxruntime has {', '.join(found)} only (onnxruntime-gpu)"


def _driver() -> str:
    if missing := _module("cuda", "pip install cuda-bindings")():
        return missing
    try:
        from cuda.bindings import driver

        status = driver.cuInit(0)[0]
    except (ImportError, RuntimeError) as error:
        return f"no CUDA driver can be used: {error}"
    return f"the CUDA driver finds no GPU ({status.name})" if int(status) else ""


def _compiler() -> str:
    from vl2.plugins.cuda.nvrtc import find_nvrtc
    from vl2.plugins.cuda.pack import ARCHITECTURES, find_nvcc, is_cached

    if find_nvcc() or find_nvrtc() or all(map(is_cached, ARCHITECTURES)):
        return ""
    return "neither nvcc nor NVRTC is here to compile the kernels (pip install 'nvidia-cuda-nvrtc>=13')"


_RTX = _module("tensorrt_rtx", "pip install '.[engine]'")
# What is checked, and what each needs: functions that give what is missing, or nothing.
CHECKS: dict[Callable[[Run], dict], Sequence[Callable[[], str]]] = {
    kernels: (_driver, _compiler),
    step: (_driver, _compiler),
    peers: (_driver, _compiler, _torch_cuda),
    sanitizers: (_driver, _compiler, _tool("compute-sanitizer")),
    engine: (_driver, _compiler, _RTX),
    engine_answers: (_driver, _compiler, _RTX),
    engine_rate: (_driver, _compiler, _RTX),
    onnxruntime_cuda: (_cuda_provider,),
    training: (_torch_cuda,),
}


def perform(check: Callable[[Run], dict], needs: Sequence[Callable[[], str]], run: Run) -> dict:
    """One row: state `ok`, `failed` or `skipped`, what was found or why, seconds."""
    row, began = {"check": check.__name__}, time.monotonic()
    if missing := next(filter(None, (need() for need in needs)), ""):
        return row | {"state": "skipped", "why": missing}
    try:
        row |= {"state": "ok", "found": check(run)}
    except (Failure, OSError, LookupError, ValueError) as error:
        row |= {"state": "failed", "why": f"{type(error).__name__}: {error}"}
    return row | {"seconds": round(time.monotonic() - began, 1)}


def main(arguments: list[str]) -> int:
    """Prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CHECK", choices=[check.__name__ for check in CHECKS])
    parser.add_argument("--list", action="store_true", help="the checks, and what each needs and misses here")
    parser.add_argument("--logs", type=Path, default=Path("gpu-checks"))
    given = parser.parse_args(arguments)
    chosen = {check: needs for check, needs in CHECKS.items() if given.only is None or check.__name__ in given.only}
    if given.list:
        for check, needs in chosen.items():
            print(f"{check.__name__:18} {check.__doc__} {'; '.join(filter(None, (need() for need in needs)))}")
        return 0
    given.logs.mkdir(parents=True, exist_ok=True)
    folder, rows = given.logs.resolve(), []
    for check, needs in chosen.items():
        rows.append(perform(check, needs, Run(folder, folder / f"{check.__name__}.log")))
        row = rows[-1]
        print(f"{row['check']:18} {row['state']:8} {row.get('seconds', ''):>7} {row.get('why', '')}", flush=True)
    print(json.dumps({"gpu": _gpu(), "date": time.strftime("%Y-%m-%d"), "rows": rows}))
    return int(any(row["state"] == "failed" for row in rows))


def _gpu() -> str:
    """Name, driver, compute capability, as nvidia-smi has them."""
    if _tool("nvidia-smi")():
        return "nvidia-smi is not on the PATH"
    fields = "--query-gpu=name,driver_version,compute_cap,memory.total"
    asked = ["nvidia-smi", fields, "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

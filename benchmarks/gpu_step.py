"""All kernels of a whole decoder's decode step in one CUDA graph: time, tokens/s, share of the limit.

    python benchmarks/gpu_step.py [tiny small] [--rounds 20]      on a GPU
    python benchmarks/gpu_step.py --emulate                       on a CPU, a miniature: that it runs; no times

Every layer has weights and caches of its own, stored as the recipe `int4` stores them (experts INT4 in groups of 32,
the rest INT8), the cache 2,000 positions. Norms, residual additions, the embedding and Small's absorbed products of
kv_b_proj are TensorRT's and not counted; whole engines are measured by `vl2 bench`. The limit is the bytes of weights
and caches read once at the rate of a large copy in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from gpu_cases import HEADS, LATENTS, LAYERS, STORED, Case, _fitting, experts_case, heads_case, latent_case, linear_case

from vl2.plugins.cuda.experts import ExpertsProblem
from vl2.plugins.cuda.launch import workspace_bytes
from vl2.plugins.cuda.linear import LinearProblem
from vl2.plugins.cuda.routing import RoutingProblem


@dataclass(frozen=True)
class Decoder:
    """layers: the first is dense; attention: matrices [N, K] around it; dense: the first's intermediate size."""

    layers: int
    attention: tuple[tuple[int, int], ...]
    attend: Callable[[np.random.Generator, str], Case]
    experts: ExpertsProblem
    dense: int
    vocabulary: int
    past: int


def _experts(name: str, count: int, top_k: int) -> ExpertsProblem:
    layer, int4, int8 = LAYERS[name], STORED["int4 g32"], STORED["int8"]
    routing = RoutingProblem(1, count, top_k)
    shared = layer.shared_size or 128
    return replace(layer, routing=routing, gate_up=_fitting(int4, layer.hidden_size),
                   down=_fitting(int4, layer.inner_size),
                   shared_gate_up=_fitting(int8, layer.hidden_size), shared_down=_fitting(int8, shared))


DECODERS = {
    "tiny": Decoder(12, ((1280, 1280),) * 4, partial(heads_case, HEADS["tiny"], 2000), _experts("tiny", 64, 6), 6848,
                    129280, 2000),
    "small": Decoder(27, ((3072, 2048), (576, 2048), (2048, 2048)),
                     partial(latent_case, LATENTS["small"], 2000), _experts("small", 64, 6), 10944, 102400, 2000),
    "nano": Decoder(2, ((128, 128),) * 4, partial(heads_case, HEADS["nano"], 70), _experts("nano", 8, 2), 128, 384, 70),
}


@dataclass(frozen=True)
class Part:
    """A case and how many times the step has it, each with buffers of its own."""

    case: Case
    times: int


def parts(decoder: Decoder) -> list[Part]:
    """The step's kernels; layers differ in their addresses only."""
    rng, hidden = np.random.default_rng(0), decoder.experts.hidden_size

    def product(rows: int, columns: int) -> Case:
        problem = LinearProblem(1, rows, columns, _fitting(STORED["int8"], columns))
        return linear_case(problem, rng, f"linear {rows}x{columns}")

    shapes: dict[tuple[int, int], int] = {}
    for shape in decoder.attention:
        shapes[shape] = shapes.get(shape, 0) + decoder.layers
    dense, head = (decoder.dense, hidden), (decoder.vocabulary, hidden)
    for shape in (dense, dense, dense[::-1], head):
        shapes[shape] = shapes.get(shape, 0) + 1
    found = [Part(product(*shape), times) for shape, times in shapes.items()]
    found.append(Part(decoder.attend(rng, "attention"), decoder.layers))
    found.append(Part(experts_case(decoder.experts, rng, "experts"), decoder.layers - 1))
    return found


def measure(gpu: Any, name: str, rounds: int, copy_rate: float) -> dict[str, Any]:
    """Facts of one decoder's step."""
    held = parts(DECODERS[name])
    seconds = gpu.step_seconds([part.case for part in held for _ in range(part.times)], rounds)
    size = sum(part.case.read_bytes * part.times for part in held)
    return {"decoder": name, "past": DECODERS[name].past, "us": seconds * 1e6, "read_bytes": size,
            "tokens_per_second": 1 / seconds, "share_of_limit": size / copy_rate / seconds,
            "kernels": sum(len(part.case.plan.launches) * part.times for part in held),
            "workspace_bytes": max(workspace_bytes(part.case.plan) for part in held)}


def main(arguments: list[str]) -> int:
    """A line and a JSON line."""
    from gpu_kernels import EmulatedGpu, Gpu, error_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decoders", nargs="*", default=["tiny", "small"], metavar="DECODER", help=", ".join(DECODERS))
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args(arguments)
    if unknown := set(given.decoders) - set(DECODERS):
        parser.error(f"no decoder {', '.join(sorted(unknown))}; expected {', '.join(DECODERS)}")
    if given.emulate:
        gpu = EmulatedGpu()
        errors = {part.case.name: error_of(part.case, gpu.check(part.case)) for part in parts(DECODERS["nano"])}
        bounds = {part.case.name: part.case.bound for part in parts(DECODERS["nano"])}
        print(json.dumps({"device": gpu.name, "errors": errors}))
        return int(any(error > bounds[name] for name, error in errors.items()))
    from cuda.bindings import driver

    gpu = Gpu(driver)
    rate = gpu.copy_bytes_per_second(given.rounds)
    rows = []
    for name in given.decoders:
        rows.append(measure(gpu, name, given.rounds, rate))
        print("{decoder}: {us:.0f} us a step at {past:,} positions, {tokens_per_second:.0f} tokens/s, "
              "{share_of_limit:.2f} of the limit, {kernels} kernels".format(**rows[-1]), flush=True)
    print(json.dumps({"device": gpu.name, "copy_bytes_per_s": rate, "rows": rows, "date": time.strftime("%Y-%m-%d")}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

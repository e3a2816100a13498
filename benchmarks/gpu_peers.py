"""The CUDA kernels beside what PyTorch makes of the same problems, eager and compiled, and the device's matrix rate.

    python benchmarks/gpu_peers.py [--only "experts tiny"] [--rounds 20]      needs torch with CUDA

Same inputs, same results (checked against float64), same stored weights: PyTorch dequantizes and multiplies. Its steps
are replayed as a CUDA graph over the same number of copies, so that neither launches nor caches speak for a side.
A table, then one JSON line; microseconds, and PyTorch's time over the kernels'.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import gpu_cases
import numpy as np
import torch
import torch.nn.functional as F
from gpu_cases import Case, Extent
from gpu_kernels import error_of as kernel_error
from torch import Tensor

from vl2.plugins.cuda.storage import Storage

CHOSEN = ("experts tiny int4 g32", "experts tiny fp16", "experts small int4 g32", "experts small fp16",
          "linear tiny q int8", "linear tiny head fp16", "linear small o int8", "linear small o fp16", "latent small",
          "attention tiny")  # fmt: skip
# Float16 sums of a library in another order, over the RMS of the result.
AGREES = 3e-2
MATRIX = 8192

Tensors = dict[str, Tensor]


def dequantized(held: Tensors, name: str, storage: Storage, chosen: Tensor | None = None) -> Tensor:
    """float16 [.., N, K] of a weight, or of the `chosen` experts of a stack."""
    codes, scales = (part if part is None or chosen is None else part[chosen]
                     for part in (held[name], held.get(f"{name}_scale")))
    if scales is None:
        return codes
    if storage.scheme == "int4":
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).to(torch.int8) - 8
    groups = codes.unflatten(-1, (scales.shape[-1], -1))
    return (groups.half() * scales.unsqueeze(-1)).flatten(-2)


def linear(problem: Any, past: int | None) -> Callable[[Tensors], Tensor]:
    """x Wᵀ."""
    return lambda held: F.linear(held["x"], dequantized(held, "weight", problem.storage))


def experts(problem: Any, past: int | None) -> Callable[[Tensors], Tensor]:
    """One token gathers its experts; many go through all of them, weighted: shapes must not depend on values."""
    routing, stored = problem.routing, (problem.gate_up, problem.gate_up, problem.down)

    def routed(held: Tensors) -> tuple[Tensor, Tensor]:
        scores = held["logits"].sigmoid() if routing.scoring_func == "sigmoid" else held["logits"].softmax(-1)
        biased = routing.topk_method == "noaux_tc"
        chosen = (scores + held["correction_bias"] if biased else scores).topk(routing.top_k).indices
        weights = scores.gather(1, chosen)
        if routing.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights * routing.routed_scaling_factor

    def run(held: Tensors) -> Tensor:
        chosen, weights = routed(held)
        x = held["x"]
        if len(x) == 1:
            gate, up, down = (dequantized(held, name, form, chosen[0])
                              for name, form in zip(("gate", "up", "down"), stored, strict=True))
            hidden = F.silu(gate @ x[0]) * (up @ x[0])
            y = ((down @ hidden.unsqueeze(-1)).squeeze(-1) * weights[0].half().unsqueeze(-1)).sum(0, keepdim=True)
        else:
            share = torch.zeros_like(held["logits"]).scatter(1, chosen, weights).half()
            gate, up, down = (dequantized(held, name, form)
                              for name, form in zip(("gate", "up", "down"), stored, strict=True))
            hidden = F.silu(x @ gate.mT) * (x @ up.mT) * share.mT.unsqueeze(-1)
            y = (hidden @ down.mT).sum(0)
        gate, up = (dequantized(held, f"shared_{name}", problem.shared_gate_up) for name in ("gate", "up"))
        return y + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up),
                            dequantized(held, "shared_down", problem.shared_down))

    return run


def _rotated(x: Tensor, held: Tensors) -> Tensor:
    """[B, T, heads, size], pairs (i, i + size / 2)."""
    low, high = x.chunk(2, -1)
    turned = torch.cat((-high, low), -1)
    return (x * held["cos"].unsqueeze(2) + turned * held["sin"].unsqueeze(2)).half()


def _attend(query: Tensor, keys: Tensor, values: Tensor, past: int, scale: float) -> Tensor:
    """query [B, h, T, d], keys [B, 1 or h, past + T, d]: causal, by PyTorch's fused attention where it has one."""
    tokens, seen = query.shape[-2], keys.shape[-2]
    mask = None
    if tokens > 1:
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=query.device).tril(past)
    keys, values = (part.expand(-1, query.shape[1], -1, -1) for part in (keys, values))
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)


def heads(problem: Any, past: int) -> Callable[[Tensors], Tensor]:
    """Multi-head attention; new keys and values are written into the caches first."""
    shape, seen = (problem.batch, problem.tokens, -1, problem.head_dim), past + problem.tokens

    def run(held: Tensors) -> Tensor:
        query, key = (_rotated(held[name].view(shape), held) for name in ("query", "key"))
        held["key_cache"][:, past:seen] = key
        held["value_cache"][:, past:seen] = held["value"].view(shape)
        keys, values = (held[name][:, :seen].transpose(1, 2) for name in ("key_cache", "value_cache"))
        return _attend(query.transpose(1, 2), keys, values, past, problem.scale).transpose(1, 2).flatten(2)

    return run


def latent(problem: Any, past: int) -> Callable[[Tensors], Tensor]:
    """Absorbed latent attention: every head's keys are the cache's rows, its values their first `rank` numbers."""
    seen = past + problem.tokens

    def turned(x: Tensor, held: Tensors) -> Tensor:
        return _rotated(torch.cat((x[..., 0::2], x[..., 1::2]), -1), held)

    def run(held: Tensors) -> Tensor:
        key = turned(held["key_rope"].unsqueeze(2), held).squeeze(2)
        held["cache"][:, past:seen] = torch.cat((held["latent"], key), -1)
        query = torch.cat((held["query"], turned(held["query_rope"], held).transpose(1, 2)), -1)
        keys = held["cache"][:, None, :seen]
        return _attend(query, keys, keys[..., :problem.rank], past, problem.scale)

    return run


PEERS = {gpu_cases.linear_case: linear, gpu_cases.experts_case: experts, gpu_cases.heads_case: heads,
         gpu_cases.latent_case: latent}


def peer_of(make: Any) -> Callable[[Tensors], Tensor]:
    """PyTorch's function for a case as `gpu_cases.cases` gives it: a partial of its maker, the problem and the past."""
    problem, *past = make.args
    return PEERS[make.func](problem, past[0] if past else None)


def tensors(case: Case, device: str) -> Tensors:
    """The case's inputs on a device."""
    return {name: torch.from_numpy(array.copy()).to(device) for name, array in case.arrays.items()}


def error_of(case: Case, found: Tensor) -> float:
    """max |Δ| over the RMS of what is wanted."""
    want = case.wanted["y"]
    return float(np.abs(found.double().cpu().numpy().reshape(want.shape) - want).max() / np.sqrt((want**2).mean()))


def seconds(run: Callable[[Tensors], Tensor], sets: list[Tensors], rounds: int) -> float:
    """Median of one run over `rounds` replays of a CUDA graph that goes through all sets of buffers."""
    for held in sets * 3:
        run(held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(held) for held in sets]  # noqa: F841 - results stay allocated while the graph lives
    return timed(graph.replay, rounds) / len(sets)


def timed(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of `work` on the device."""
    found = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return float(np.median(found[2:]))


def matrix_rate(rounds: int) -> float:
    """Operations a second of a large bfloat16 product of random numbers."""
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * MATRIX**3 / timed(lambda: a @ b, rounds)


def require_right(gpu: Any, case: Case) -> None:
    """Raises AssertionError where the kernels are wrong: their time would speak for nothing."""
    error = kernel_error(case, gpu.check(case))
    assert error <= case.bound, f"{case.name}: the kernels differ by {error:.1e}, expected {case.bound:.1e} at most"


def measure(gpu: Any, name: str, make: Any, rounds: int) -> dict[str, Any]:
    """One row. Raises AssertionError where PyTorch or the kernels compute something else."""
    # what was compiled for other shapes counts against the limit of recompilations
    torch._dynamo.reset()
    case = make(np.random.default_rng(0), name)
    require_right(gpu, case)
    eager = peer_of(make)
    sets = [tensors(case, "cuda") for _ in range(gpu.copies(case))]
    error = error_of(case, eager(sets[0]))
    assert error < AGREES, f"{name}: PyTorch differs by {error:.1e}"
    row = {"case": name, "us": gpu.seconds(case, rounds) * 1e6}
    compiled = torch.compile(eager, dynamic=False)
    for kind, run in (("eager", eager), ("compiled", compiled)):
        row[f"{kind}_us"] = seconds(run, sets, rounds) * 1e6
        row[f"{kind}_times"] = row[f"{kind}_us"] / row["us"]
    return row | {"tflops": case.flops / row["us"] / 1e6, "gb_per_s": case.read_bytes / row["us"] / 1e3}


def main(arguments: list[str]) -> int:
    """Prints the table and the JSON line."""
    from cuda.bindings import driver
    from gpu_kernels import Gpu

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args(arguments)
    torch.cuda.init()
    gpu, rows, rate = Gpu(driver), [], matrix_rate(given.rounds)
    print(f"{'case':40} {'us':>9} {'eager':>9} {'compiled':>9} {'TFLOP/s':>8} {'of bf16':>8}")
    with torch.inference_mode():
        for name, make in gpu_cases.cases(Extent(1024, 2000, True)):
            if name.startswith(CHOSEN) and given.only in name:
                row = measure(gpu, name, make, given.rounds)
                rows.append(row)
                print(f"{name:40} {row['us']:9.1f} {row['eager_times']:8.2f}x {row['compiled_times']:8.2f}x "
                      f"{row['tflops']:8.2f} {row['tflops'] * 1e12 / rate:8.3f}", flush=True)
    print(json.dumps({"device": gpu.name, "torch": torch.__version__, "bf16_flops_per_s": rate, "rows": rows,
                      "date": time.strftime("%Y-%m-%d")}))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

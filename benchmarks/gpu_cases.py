"""What `gpu_kernels.py` runs: problems with random inputs, float64 results, and the bytes and operations counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import gpu_references as reference
import numpy as np

from vl2.plugins.cuda.attention import AttentionProblem, attention_plan
from vl2.plugins.cuda.experts import ExpertsProblem, experts_plan
from vl2.plugins.cuda.latent import LatentProblem, latent_plan
from vl2.plugins.cuda.launch import Plan
from vl2.plugins.cuda.linear import LinearProblem, linear_plan
from vl2.plugins.cuda.routing import RoutingProblem, route_launch
from vl2.plugins.cuda.storage import Storage

# max |Δ| beyond a float16 result's rounding over the RMS: float32 sums; products of rounded halves; attention.
EXACT, ROUNDED, ATTENTION = 3e-5, 4e-3, 1e-2
BASE = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.0}
STORED = {"int4 g32": Storage("int4", 32), "int4 g64": Storage("int4", 64), "int4 g128": Storage("int4", 128),
          "int8": Storage("int8"), "fp16": Storage("fp16")}  # fmt: skip
# Eight experts stand for all: the ones that were not chosen are not read, and copies keep the caches cold.
LAYERS = {
    "tiny": ExpertsProblem(RoutingProblem(1, 8, 6), 1280, 896, 1792),
    "small": ExpertsProblem(RoutingProblem(1, 8, 6), 2048, 1408, 2816),
    "base": ExpertsProblem(RoutingProblem(1, 8, 6, **BASE), 2560, 1536, 3072),
    "nano": ExpertsProblem(RoutingProblem(1, 8, 2), 128, 64, 128),
    "tiny-mini": ExpertsProblem(RoutingProblem(1, 12, 4), 96, 64, 128),
    "small-mini": ExpertsProblem(RoutingProblem(1, 16, 6), 96, 48, 96),
    "base-mini": ExpertsProblem(RoutingProblem(1, 16, 4, **BASE), 128, 64, 128),
}
MATRICES = {"tiny q": (1280, 1280), "tiny dense down": (1280, 6848), "tiny head": (129280, 1280),
            "small q": (3072, 2048), "small kv": (576, 2048), "small o": (2048, 2048), "base dense gate": (12288, 2560),
            "base dense down": (2560, 12288), "nano head": (384, 128)}  # fmt: skip
ROUTERS = {"small": RoutingProblem(1, 64, 6), "base": RoutingProblem(1, 72, 6, **BASE),
           "v2": RoutingProblem(1, 160, 6, "group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0),
           "v3": RoutingProblem(1, 256, 8, "noaux_tc", "sigmoid", 8, 4, True, 2.5)}  # fmt: skip
LATENTS = {"small": LatentProblem(1, 16, 1, 512, 64, 4096, 0.07), "base": LatentProblem(1, 32, 1, 512, 64, 4096, 0.07),
           "small-mini": LatentProblem(2, 4, 1, 48, 16, 200, 0.2), "base-mini": LatentProblem(2, 8, 1, 32, 8, 150, 0.2)}
HEADS = {"tiny": AttentionProblem(1, 10, 10, 1, 128, 4096, 0.09), "nano": AttentionProblem(1, 4, 4, 1, 32, 512, 0.18)}


@dataclass(frozen=True)
class Extent:
    """How much of each problem is run: tokens of a prefill, keys of a long cache, whether layers are whole."""

    prefill: int
    past: int
    whole: bool


@dataclass(frozen=True)
class Case:
    """A plan with its buffers; wanted: float64 results by name; read_bytes: weights and caches; flops: 2 a product."""

    name: str
    plan: Plan
    arrays: dict[str, np.ndarray]
    wanted: dict[str, np.ndarray]
    bound: float
    read_bytes: int
    flops: int


def cases(extent: Extent) -> Iterator[tuple[str, Callable[[np.random.Generator, str], Case]]]:
    """Names of cases, every kernel over the family's shapes, and how each is made."""
    for name, router in ROUTERS.items():
        for tokens in (1, extent.prefill):
            yield f"route {name} × {tokens}", partial(routing_case, replace(router, tokens=tokens))
    for name, layer in LAYERS.items():
        for form, storage in STORED.items():
            small = layer.hidden_size < 256
            for tokens in (1, extent.prefill) if small or extent.whole and extent.prefill >= 256 else (1,):
                problem = _stored(layer, storage, tokens, extent)
                yield f"experts {name} {form} × {tokens}", partial(experts_case, problem)
    for name, (rows, columns) in MATRICES.items():
        rows = rows if extent.whole else min(rows, 96)
        for form in ("int4 g64", "int8", "fp16"):
            for tokens in (1, extent.prefill) if extent.prefill >= 256 else (1,):
                problem = LinearProblem(tokens, rows, columns, _fitting(STORED[form], columns))
                yield f"linear {name} {form} × {tokens}", partial(linear_case, problem)
    for kind, table, make in (("latent", LATENTS, latent_case), ("attention", HEADS, heads_case)):
        for name, problem in table.items():
            capacity = problem.capacity if extent.whole else min(problem.capacity, 2 * extent.past + extent.prefill)
            for tokens in (1, min(extent.prefill, capacity // 2)):
                sized, past = replace(problem, tokens=tokens, capacity=capacity), min(extent.past, capacity - tokens)
                yield f"{kind} {name} {tokens} after {past}", partial(make, sized, past)


def routing_case(problem: RoutingProblem, rng: np.random.Generator, name: str) -> Case:
    logits = rng.standard_normal((problem.tokens, problem.experts), np.float32)
    bias = rng.standard_normal(problem.experts, np.float32) / 10
    chosen, weights = reference.route(logits, bias, problem)
    arrays = {"logits": logits, "correction_bias": bias, "idx": np.full(chosen.shape, -1, np.int32),
              "weights": np.full(chosen.shape, np.nan, np.float32)}  # fmt: skip
    wanted = {"idx": chosen.astype(np.float64), "weights": weights}
    return Case(name, Plan((route_launch(problem),), {}), arrays, wanted, EXACT, logits.nbytes, 0)


def experts_case(problem: ExpertsProblem, rng: np.random.Generator, name: str) -> Case:
    routing, hidden, inner, shared = problem.routing, problem.hidden_size, problem.inner_size, problem.shared_size
    weights = {"gate": ((routing.experts, inner, hidden), problem.gate_up), "up": ((routing.experts, inner, hidden),
               problem.gate_up), "down": ((routing.experts, hidden, inner), problem.down)}  # fmt: skip
    if shared:
        weights |= {"shared_gate": ((shared, hidden), problem.shared_gate_up), "shared_up": ((shared, hidden),
                    problem.shared_gate_up), "shared_down": ((hidden, shared), problem.shared_down)}  # fmt: skip
    arrays = {"x": reference.half(rng, (routing.tokens, hidden)),
              "logits": rng.standard_normal((routing.tokens, routing.experts), np.float32),
              "correction_bias": rng.standard_normal(routing.experts, np.float32) / 10,
              "y": np.full((routing.tokens, hidden), np.nan, np.float16)}  # fmt: skip
    for weight, (shape, storage) in weights.items():
        arrays |= reference.random_weight(rng, shape, storage, weight)
    wanted, used = reference.experts(arrays, problem)
    held = sum(array.nbytes for key, array in arrays.items() if key.startswith("shared"))
    stack = sum(arrays[key].nbytes for key in arrays if key.split("_")[0] in ("gate", "up", "down"))
    flops = 2 * routing.tokens * 3 * hidden * (routing.top_k * inner + shared)
    bound = EXACT if routing.tokens <= 4 else ROUNDED
    read = held + stack * used // routing.experts
    return Case(name, experts_plan(problem), arrays, {"y": wanted}, bound, read, flops)


def linear_case(problem: LinearProblem, rng: np.random.Generator, name: str) -> Case:
    arrays = reference.random_weight(rng, (problem.rows, problem.columns), problem.storage, "weight")
    held = sum(array.nbytes for array in arrays.values())
    arrays["x"] = reference.half(rng, (problem.tokens, problem.columns))
    arrays["y"] = np.full((problem.tokens, problem.rows), np.nan, np.float16)
    wanted = reference.linear(arrays, problem)
    flops = 2 * problem.tokens * problem.rows * problem.columns
    bound = EXACT if problem.tokens <= 4 else ROUNDED
    return Case(name, linear_plan(problem), arrays, {"y": wanted}, bound, held, flops)


def latent_case(p: LatentProblem, past: int, rng: np.random.Generator, name: str) -> Case:
    width, tables = p.rank + p.rope_dim, reference.rope_tables(rng, (p.batch, p.tokens, p.rope_dim))
    arrays = {"query": reference.half(rng, (p.batch, p.heads, p.tokens, p.rank)), "past_length": np.array([past]),
              "query_rope": reference.half(rng, (p.batch, p.tokens, p.heads, p.rope_dim)),
              "latent": reference.half(rng, (p.batch, p.tokens, p.rank)), **tables,
              "key_rope": reference.half(rng, (p.batch, p.tokens, p.rope_dim)),
              "cache": reference.half(rng, (p.batch, p.capacity, width)),
              "y": np.full((p.batch, p.heads, p.tokens, p.rank), np.nan, np.float16)}  # fmt: skip
    seen = past + p.tokens
    flops = 2 * p.batch * p.heads * p.tokens * (past + p.tokens // 2) * (width + p.rank)
    wanted, read = reference.latent(arrays, p, past), p.batch * seen * width * 2
    return Case(name, latent_plan(p), arrays, wanted, ATTENTION, read, flops)


def heads_case(p: AttentionProblem, past: int, rng: np.random.Generator, name: str) -> Case:
    arrays = {"query": reference.half(rng, (p.batch, p.tokens, p.heads * p.head_dim)), "past_length": np.array([past])}
    arrays |= {key: reference.half(rng, (p.batch, p.tokens, p.kv_heads * p.head_dim)) for key in ("key", "value")}
    arrays |= reference.rope_tables(rng, (p.batch, p.tokens, p.head_dim))
    caches = (p.batch, p.capacity, p.kv_heads, p.head_dim)
    arrays |= {key: reference.half(rng, caches) for key in ("key_cache", "value_cache")}
    arrays["y"] = np.full((p.batch, p.tokens, p.heads * p.head_dim), np.nan, np.float16)
    read = 2 * p.batch * (past + p.tokens) * p.kv_heads * p.head_dim * 2
    flops = 4 * p.batch * p.heads * p.tokens * (past + p.tokens // 2) * p.head_dim
    wanted = reference.heads(arrays, p, past)
    return Case(name, attention_plan(p), arrays, wanted, ATTENTION, read, flops)


def _stored(layer: ExpertsProblem, storage: Storage, tokens: int, extent: Extent) -> ExpertsProblem:
    """A layer with weights of a scheme; where layers are not whole, two chosen experts of a published one."""
    if not extent.whole and layer.hidden_size > 256:
        layer = replace(layer, routing=replace(layer.routing, experts=3, top_k=2), shared_size=0)
    hidden, inner, shared = (_fitting(storage, size) for size in
                             (layer.hidden_size, layer.inner_size, layer.shared_size or 128))  # fmt: skip
    routing = replace(layer.routing, tokens=tokens)
    return replace(layer, routing=routing, gate_up=hidden, down=inner, shared_gate_up=hidden, shared_down=shared)


def _fitting(storage: Storage, columns: int) -> Storage:
    """The largest group that divides the row, one scale a row for int8."""
    size = storage.group_size or columns
    while columns % size:
        size //= 2
    return Storage(storage.scheme, 0 if storage.scheme == "fp16" else size)

"""A random MoE layer for the kernels and its reference, made of the eager operator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from tests.plugins.cuda.weights import half, random_weight
from vl2.model.moe import choose_experts
from vl2.plugins.cuda.experts import ExpertsProblem
from vl2.plugins.cuda.routing import RoutingProblem
from vl2.plugins.cuda.storage import Storage
from vl2.plugins.experts.op import experts

BASE = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.0}
# Widths of the family's layers; the stack is shortened to a few experts more than are chosen.
LAYERS = {
    "tiny": ExpertsProblem(RoutingProblem(1, 8, 6), 1280, 896, 1792),
    "small": ExpertsProblem(RoutingProblem(1, 8, 6), 2048, 1408, 2816),
    "base": ExpertsProblem(RoutingProblem(1, 9, 6, **BASE), 2560, 1536, 3072),
    "nano": ExpertsProblem(RoutingProblem(3, 8, 2), 128, 64, 128),
    "tiny-mini": ExpertsProblem(RoutingProblem(3, 12, 4), 96, 64, 128),
    "small-mini": ExpertsProblem(RoutingProblem(2, 16, 6), 96, 48, 96),
    "base-mini": ExpertsProblem(RoutingProblem(2, 16, 4, **BASE), 128, 64, 128),
    "no shared experts": ExpertsProblem(RoutingProblem(2, 5, 3), 48, 80),
    "shared of an odd width": ExpertsProblem(RoutingProblem(2, 5, 3), 48, 80, 112),
}


def stored(problem: ExpertsProblem, storage: Storage, shared: Storage | None = None) -> ExpertsProblem:
    """The layer with weights of a scheme, in groups that divide their rows."""
    shared = storage if shared is None else shared
    hidden, inner, shared_size = problem.hidden_size, problem.inner_size, problem.shared_size or problem.inner_size
    return replace(
        problem, gate_up=fitting(storage, hidden), down=fitting(storage, inner),
        shared_gate_up=fitting(shared, hidden), shared_down=fitting(shared, shared_size),
    )  # fmt: skip


def fitting(storage: Storage, columns: int) -> Storage:
    """The storage with the largest group that divides the row; 0 stands for the whole row."""
    size = storage.group_size or columns
    while columns % size:
        size //= 2
    return Storage(storage.scheme, 0 if storage.scheme == "fp16" else size)


class Rule:
    """A routing problem with the names of a language configuration."""

    def __init__(self, problem: RoutingProblem):
        self.num_experts_per_tok = problem.top_k
        for name in ("topk_method", "scoring_func", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"):
            setattr(self, name, getattr(problem, name))


def random_layer(
    rng: np.random.Generator, problem: ExpertsProblem, favoured: int | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Buffers of the plan, y as NaN, and the result wanted. favoured: an expert that every token takes."""
    routing, hidden, inner, shared = problem.routing, problem.hidden_size, problem.inner_size, problem.shared_size
    arrays, values = {}, {}
    shapes = {"gate": (routing.experts, inner, hidden), "up": (routing.experts, inner, hidden),
              "down": (routing.experts, hidden, inner)}  # fmt: skip
    if shared:
        shapes |= {"shared_gate": (shared, hidden), "shared_up": (shared, hidden), "shared_down": (hidden, shared)}
    storages = {"gate": problem.gate_up, "up": problem.gate_up, "down": problem.down,
                "shared_gate": problem.shared_gate_up, "shared_up": problem.shared_gate_up,
                "shared_down": problem.shared_down}  # fmt: skip
    for name, shape in shapes.items():
        buffers, values[name] = random_weight(rng, shape, storages[name], name)
        arrays |= buffers
    arrays["x"] = half(rng, (routing.tokens, hidden))
    arrays["logits"] = rng.standard_normal((routing.tokens, routing.experts), np.float32)
    if favoured is not None:
        arrays["logits"][:, favoured] += 10
    arrays["correction_bias"] = rng.standard_normal(routing.experts, np.float32) / 10
    arrays["y"] = np.full((routing.tokens, hidden), np.nan, np.float16)
    return arrays, reference(arrays, values, routing)


def reference(arrays: dict[str, np.ndarray], values: dict[str, np.ndarray], routing: RoutingProblem) -> np.ndarray:
    """The layer in float32 (its operator's sums are), from dequantized weights and experts chosen in float64."""
    w = {name: torch.from_numpy(value).float() for name, value in values.items()}
    x = torch.from_numpy(arrays["x"]).float()
    logits, bias = torch.from_numpy(arrays["logits"]).double(), torch.from_numpy(arrays["correction_bias"])
    chosen = choose_experts(logits, bias, Rule(routing))
    y = experts(x, chosen.idx, chosen.weights.float(), w["gate"], w["up"], w["down"])
    if "shared_gate" in w:
        y += (torch.nn.functional.silu(x @ w["shared_gate"].T) * (x @ w["shared_up"].T)) @ w["shared_down"].T
    return y.double().numpy()

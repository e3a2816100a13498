"""The routing kernels, emulated, against `vl2.model.moe.choose_experts` in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.plugins.cuda.experts_layer import Rule
from tests.tolerances import ROUTER_WEIGHTS, assert_close
from vl2.errors import VL2Error
from vl2.model.moe import choose_experts
from vl2.plugins.cuda.launch import Plan
from vl2.plugins.cuda.routing import RoutingProblem, route_launch, sort_launch

# Experts, chosen and methods of Tiny, Small, Base, nano, the minis, DeepSeek-V2 and V3.
FAMILY = {
    "tiny, small": RoutingProblem(7, 64, 6),
    "base": RoutingProblem(6, 72, 6, "noaux_tc", "sigmoid", norm_topk_prob=True, routed_scaling_factor=2.0),
    "nano": RoutingProblem(9, 8, 2),
    "tiny-mini": RoutingProblem(3, 12, 4),
    "small-mini": RoutingProblem(3, 16, 6),
    "base-mini": RoutingProblem(3, 16, 4, "noaux_tc", "sigmoid", norm_topk_prob=True, routed_scaling_factor=2.0),
    "v2": RoutingProblem(5, 160, 6, "group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0),
    "v3": RoutingProblem(5, 256, 8, "noaux_tc", "sigmoid", 8, 4, True, 2.5),
    "softmax with bias": RoutingProblem(5, 48, 5, "noaux_tc", "softmax", 4, 2),
    "one": RoutingProblem(1, 1, 1, norm_topk_prob=True),
    "odd": RoutingProblem(5, 37, 3, scoring_func="sigmoid"),
}


def run_route(emulator, problem: RoutingProblem, logits: np.ndarray, bias: np.ndarray, order: int = 0):
    arrays = {
        "logits": logits, "correction_bias": bias, "idx": np.full((len(logits), problem.top_k), -1, np.int32),
        "weights": np.full((len(logits), problem.top_k), np.nan, np.float32),
    }  # fmt: skip
    emulator.run(Plan((route_launch(problem),), {}), arrays, order)
    return arrays["idx"], arrays["weights"]


@pytest.mark.parametrize("name", FAMILY)
def test_the_kernel_chooses_and_weighs_as_the_reference(emulator, name: str) -> None:
    problem, rng = FAMILY[name], np.random.default_rng(3)
    logits = rng.standard_normal((problem.tokens, problem.experts), np.float32) * 2
    bias = rng.standard_normal(problem.experts, np.float32) / 10
    idx, weights = run_route(emulator, problem, logits, bias, order=int(rng.integers(8)))
    want = choose_experts(torch.from_numpy(logits).double(), torch.from_numpy(bias), Rule(problem))
    got, expected = (np.zeros(logits.shape) for _ in range(2))
    np.put_along_axis(got, idx.astype(int), weights, 1)
    np.put_along_axis(expected, want.idx.numpy(), want.weights.numpy(), 1)
    assert (np.sort(idx) == np.sort(want.idx.numpy())).all()
    assert_close(got, expected, ROUTER_WEIGHTS)


def test_of_equal_scores_the_lower_experts_are_taken(emulator) -> None:
    idx, weights = run_route(emulator, FAMILY["tiny, small"], np.zeros((7, 64), np.float32), np.zeros(64, np.float32))
    assert (idx == np.arange(6)).all() and np.allclose(weights, 1 / 64)


def test_nan_logits_still_choose_distinct_experts_that_exist(emulator) -> None:
    logits = np.full((7, 64), np.nan, np.float32)
    idx, _ = run_route(emulator, FAMILY["tiny, small"], logits, np.zeros(64, np.float32))
    assert (np.sort(idx) == np.arange(6)).all()


@pytest.mark.parametrize("order", (0, 7))
@pytest.mark.parametrize("tokens, experts, top_k", ((1, 8, 2), (37, 12, 4), (150, 72, 6)))
def test_sorting_is_stable_and_loses_no_choice(emulator, tokens: int, experts: int, top_k: int, order: int) -> None:
    rng, slots = np.random.default_rng(0), top_k + 1
    idx = np.stack([rng.permutation(experts // 2)[:top_k] for _ in range(tokens)]).astype(np.int32)
    arrays = {"idx": idx, "offsets": np.full(experts + 1, -1, np.int32)}
    arrays |= {name: np.full(tokens * top_k, -1, np.int32) for name in ("source", "target")}
    emulator.run(Plan((sort_launch(RoutingProblem(tokens, experts, top_k), slots),), {}), arrays, order)
    sorted_choices = np.argsort(idx.ravel(), kind="stable")
    assert (arrays["source"] == sorted_choices // top_k).all()
    assert (arrays["target"] == sorted_choices // top_k * slots + sorted_choices % top_k).all()
    assert (arrays["offsets"] == np.searchsorted(np.sort(idx.ravel()), np.arange(experts + 1))).all()


def test_what_no_kernel_covers_is_refused_with_the_value() -> None:
    with pytest.raises(VL2Error, match="300 experts"):
        RoutingProblem(1, 300, 6)
    with pytest.raises(VL2Error, match="`random`"):
        RoutingProblem(1, 64, 6, topk_method="random")
    with pytest.raises(VL2Error, match="3 of 7 groups of 64"):
        RoutingProblem(1, 64, 6, "group_limited_greedy", n_group=7, topk_group=3)

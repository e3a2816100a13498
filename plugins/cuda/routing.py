"""The launch plan of routing: router logits to experts and weights, and for prefill the tokens sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass

from vl2.plugins.cuda.launch import Launch, require, tiles

_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
_SCORES = ("softmax", "sigmoid")
_MOST_EXPERTS, _LANES, _TOKENS_A_BLOCK, _SORT_THREADS = 256, 32, 4, 256
_SIGMOID, _BIASED, _NORMALISED = 1, 2, 4


@dataclass(frozen=True)
class RoutingProblem:
    """N tokens and the fields of the language configuration that say how experts are chosen.

    Buffers: logits float32 [N, E], with noaux_tc correction_bias float32 [E]; idx int32 and weights float32 [N, k].
    Raises VL2Error on what the kernel does not cover.
    """

    tokens: int
    experts: int
    top_k: int
    topk_method: str = "greedy"
    scoring_func: str = "softmax"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        require(self.topk_method in _METHODS, f"topk_method `{self.topk_method}`", f"one of {', '.join(_METHODS)}")
        require(self.scoring_func in _SCORES, f"scoring_func `{self.scoring_func}`", f"one of {', '.join(_SCORES)}")
        require(1 <= self.experts <= _MOST_EXPERTS, f"{self.experts} experts", f"1 to {_MOST_EXPERTS}")
        require(1 <= self.top_k <= min(_LANES, self.experts), f"{self.top_k} chosen experts", f"1 to {_LANES}")
        size = self.experts // self.n_group
        require(1 <= self.topk_group <= self.n_group <= _LANES and size * self.n_group == self.experts,
                f"{self.topk_group} of {self.n_group} groups of {self.experts} experts", "equal groups, up to 32")
        require(size > 1 or not self.limited or self.topk_method != "noaux_tc", "groups of one expert", "two or more")

    @property
    def limited(self) -> bool:
        """Whether experts are chosen from some of the groups only."""
        return self.topk_method != "greedy" and self.n_group != self.topk_group


def route_launch(problem: RoutingProblem) -> Launch:
    """logits → idx, weights."""
    biased = problem.topk_method == "noaux_tc"
    flags = _SIGMOID * (problem.scoring_func == "sigmoid") | _BIASED * biased | _NORMALISED * problem.norm_topk_prob
    groups = (problem.n_group, problem.topk_group) if problem.limited else (1, 1)
    return Launch(
        "vl2_route", (tiles(problem.tokens, _TOKENS_A_BLOCK), 1, 1), (32 * _TOKENS_A_BLOCK, 1, 1),
        _TOKENS_A_BLOCK * 2 * problem.experts * 4,
        ("logits", "correction_bias" if biased else None, "idx", "weights", problem.tokens, problem.experts,
         problem.top_k, *groups, flags, float(problem.routed_scaling_factor)),
    )  # fmt: skip


def sort_launch(problem: RoutingProblem, slots: int) -> Launch:
    """idx → source, target int32 [N · k] and offsets int32 [E + 1]; slots: rows a token has in the result."""
    return Launch(
        "vl2_sort", (problem.experts, 1, 1), (_SORT_THREADS, 1, 1), _SORT_THREADS * 4,
        ("idx", "source", "target", "offsets", problem.tokens * problem.top_k, problem.top_k, slots),
    )  # fmt: skip

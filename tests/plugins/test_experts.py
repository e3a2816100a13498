"""The operator `vl2::experts`: its eager body against the dense truth, and against the model's own form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vl2.config import LanguageConfig
from vl2.model.moe import Experts
from vl2.plugins.experts.op import TracedExperts, experts
from vl2.plugins.substitution import substitute

EXPERTS, CHOSEN, SIZE, INNER = 5, 2, 12, 7


def stacked(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((EXPERTS, INNER, SIZE), (EXPERTS, INNER, SIZE), (EXPERTS, SIZE, INNER))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def routing(tokens: int, allowed: int = EXPERTS, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, SIZE, generator=generator, dtype=torch.float64)
    idx = torch.rand(tokens, allowed, generator=generator).argsort(-1)[:, :CHOSEN]
    return x, idx, torch.rand(tokens, CHOSEN, generator=generator)


def dense(x: Tensor, idx: Tensor, weights: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
    """Every expert computes every token; those that were not chosen weigh nothing."""
    gate, up, down = matrices
    hidden = F.silu(torch.einsum("nh,eih->nei", x, gate)) * torch.einsum("nh,eih->nei", x, up)
    outputs = torch.einsum("nei,ehi->neh", hidden, down)
    spread = torch.zeros(len(x), EXPERTS, dtype=x.dtype).scatter(1, idx, weights.to(x.dtype))
    return torch.einsum("ne,neh->nh", spread, outputs)


@pytest.mark.parametrize("tokens, allowed", [(1, EXPERTS), (9, EXPERTS), (9, CHOSEN), (64, 3)])
def test_the_eager_body_equals_the_dense_truth(tokens: int, allowed: int) -> None:
    x, idx, weights = routing(tokens, allowed)
    wanted = dense(x, idx, weights, stacked())
    # the sum is kept in float32
    torch.testing.assert_close(experts(x, idx, weights, *stacked()), wanted, atol=1e-5, rtol=1e-5)


def test_no_tokens_give_no_rows() -> None:
    x, idx, weights = routing(0)
    assert experts(x, idx, weights, *stacked()).shape == (0, SIZE)


def test_experts_that_are_not_chosen_may_hold_anything() -> None:
    x, idx, weights = routing(6, allowed=3)
    spoilt = tuple(matrix.clone() for matrix in stacked())
    for matrix in spoilt:
        matrix[3:] = float("nan")
    assert torch.equal(experts(x, idx, weights, *spoilt), experts(x, idx, weights, *stacked()))


def test_the_model_and_the_operator_agree() -> None:
    module = model_experts()
    x, idx, weights = (tensor.float() if tensor.is_floating_point() else tensor for tensor in routing(17))
    torch.testing.assert_close(TracedExperts(module)(x, idx, weights), module(x, idx, weights), atol=1e-5, rtol=1e-5)


def test_substitution_keeps_the_names_of_the_parameters() -> None:
    holder = torch.nn.Module()
    holder.experts = model_experts()
    before = {name: id(parameter) for name, parameter in holder.named_parameters()}
    substitute(holder, {Experts: TracedExperts})
    assert isinstance(holder.experts, TracedExperts)
    assert {name: id(parameter) for name, parameter in holder.named_parameters()} == before


def test_the_operator_is_registered_as_torch_wants_it() -> None:
    x, idx, weights = routing(4)
    torch.library.opcheck(experts, (x, idx, weights, *stacked()), test_utils=("test_schema", "test_faketensor"))


def model_experts() -> Experts:
    config = LanguageConfig(
        hidden_size=SIZE, moe_intermediate_size=INNER, n_routed_experts=EXPERTS, num_experts_per_tok=CHOSEN,
        topk_method="greedy", num_attention_heads=2, num_key_value_heads=2, use_mla=False, initializer_range=0.5,
    )
    torch.manual_seed(0)
    return Experts(config)

"""Blended Hessians and the accept-if-better guard: safe with any number of tokens (guide 6.3, 6.4, 8.2)."""

from __future__ import annotations

import pytest
import torch

from tests.quant.synthetic import Fixture, random_inputs, random_weight, statistics_of, swiglu_down
from vl2.quant.blend import DOWN_TOKENS, blend_with_layer, shrink_to_diagonal
from vl2.quant.choice import choose
from vl2.quant.gptq import gptq
from vl2.quant.imatrix import imatrix
from vl2.quant.objective import output_error
from vl2.quant.rtn import rtn
from vl2.quant.scheme import SCHEMES
from vl2.quant.statistics import Statistics

INT4 = SCHEMES["int4"]


def over_rtn(fixture: Fixture, statistics: Statistics, method=gptq) -> float:
    made = [method(fixture.weight, statistics, INT4), rtn(fixture.weight, None, INT4)]
    errors = [output_error(fixture.weight, one.dequantize(), fixture.test_hessian) for one in made]
    return errors[0] / errors[1]


def expert_and_layer(tokens: int) -> tuple[Fixture, Statistics]:
    """An expert whose inputs are the layer's with gains of its own; the layer's statistics from eight such experts."""
    weight = random_weight(96, 128, 0)
    shared = random_inputs(8 * 4096, 128, 0.01, 4.0)
    gains = (torch.randn(8, 1, 128) * 0.5).exp()
    inputs = (shared.unflatten(0, (8, 4096)) * gains).flatten(0, 1)
    own = inputs[:4096]
    fixture = Fixture(weight, statistics_of(own[:tokens]), statistics_of(own[2048:]).hessian)
    return fixture, statistics_of(inputs[::8])


@pytest.mark.parametrize("tokens, bar", [(0, 0.75), (8, 0.75), (64, 0.75), (512, 0.70), (2048, 0.65)])
def test_a_blended_hessian_serves_at_any_number_of_tokens(tokens: int, bar: float) -> None:
    fixture, layer = expert_and_layer(tokens)
    assert over_rtn(fixture, blend_with_layer(fixture.statistics, layer)) <= bar


@pytest.mark.parametrize("tokens", [1, 16, 256, 1024, 4096])
def test_a_shrunk_hessian_never_makes_gptq_worse_than_searched_rounding(tokens: int) -> None:
    fixture = swiglu_down(tokens)
    shrunk = shrink_to_diagonal(fixture.statistics, DOWN_TOKENS)
    assert over_rtn(fixture, shrunk) <= 1.02 * over_rtn(fixture, shrunk, imatrix)


def test_without_shrinking_gptq_on_few_tokens_is_worse_than_rounding() -> None:
    """The double descent that blending is there for; if this fails, the fixture has lost its bite."""
    fixture = swiglu_down(256)
    assert over_rtn(fixture, fixture.statistics) > 1.1


def test_an_expert_without_tokens_leans_on_the_layer_alone() -> None:
    layer = statistics_of(torch.randn(50, 16))
    nothing = Statistics(torch.full((16, 16), float("nan")), torch.full((16,), float("nan")), 0)
    blended = blend_with_layer(nothing, layer)
    assert torch.equal(blended.hessian, layer.hessian) and torch.equal(blended.abs_mean, layer.abs_mean)


def test_a_down_projection_without_tokens_counts_every_input_the_same() -> None:
    shrunk = shrink_to_diagonal(Statistics(torch.zeros(8, 8), torch.zeros(8), 0))
    assert torch.equal(shrunk.hessian, torch.eye(8))


def test_the_share_of_an_experts_own_hessian_grows_with_its_tokens() -> None:
    own, layer = Statistics(torch.eye(4) * 3, torch.ones(4), 12), Statistics(torch.eye(4), torch.ones(4), 1000)
    assert torch.allclose(blend_with_layer(own, layer).hessian, torch.eye(4) * (0.75 * 3 + 0.25))


def test_the_choice_is_never_worse_than_rounding() -> None:
    fixture = swiglu_down(64)
    candidates = {"gptq": gptq(fixture.weight, fixture.statistics, INT4), "rtn": rtn(fixture.weight, None, INT4)}
    choice = choose(fixture.weight, candidates, fixture.test_hessian)
    assert choice.method == "rtn" and choice.over_rtn == 1.0


def test_the_choice_takes_the_best_and_says_by_how_much() -> None:
    fixture = swiglu_down(4096)
    shrunk = shrink_to_diagonal(fixture.statistics, DOWN_TOKENS)
    candidates = {name: method(fixture.weight, shrunk, INT4) for name, method in (("rtn", rtn), ("gptq", gptq))}
    choice = choose(fixture.weight, candidates, shrunk.hessian)
    assert choice.method == "gptq" and choice.over_rtn < 1 and choice.quantized is candidates["gptq"]

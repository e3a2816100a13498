from __future__ import annotations

import pytest
import torch

from tests.quant.synthetic import Fixture, linear_fixture, mild, strong
from vl2.quant.awq import Consumer, search_scale
from vl2.quant.gptq import gptq
from vl2.quant.method import METHODS, quantize_weight
from vl2.quant.objective import output_error
from vl2.quant.rtn import rtn
from vl2.quant.scheme import SCHEMES
from vl2.quant.statistics import Statistics

INT4 = SCHEMES["int4"]
AWQ, AWQ_GPTQ = METHODS["awq"], METHODS["awq+gptq"]


def over_rtn(fixture: Fixture, method) -> float:
    chosen = AWQ_GPTQ if method is gptq else AWQ
    scale = search_scale([Consumer(fixture.weight, fixture.statistics, INT4)], fixture.statistics, chosen)
    made = method(fixture.weight * scale, fixture.statistics.scaled_inputs(scale), INT4).dequantize() / scale
    rounded = rtn(fixture.weight, None, INT4).dequantize()
    errors = [output_error(fixture.weight, one, fixture.test_hessian) for one in (made, rounded)]
    return errors[0] / errors[1]


@pytest.mark.parametrize("fixture", [strong, mild])
def test_scaling_beats_rounding_and_scaled_gptq_beats_gptq(fixture) -> None:
    made = fixture()
    plain = gptq(made.weight, made.statistics, INT4).dequantize()
    rounded = rtn(made.weight, None, INT4).dequantize()
    alone = output_error(made.weight, plain, made.test_hessian) / output_error(made.weight, rounded, made.test_hessian)
    assert over_rtn(made, rtn) <= 0.85
    assert over_rtn(made, gptq) <= min(0.9 * alone, 0.52)


def test_the_scale_is_one_where_no_other_loses_less() -> None:
    weight = torch.zeros(4, 32)
    statistics = Statistics(torch.eye(32), torch.ones(32), 10)
    assert torch.equal(search_scale([Consumer(weight, statistics, INT4)], statistics, AWQ), torch.ones(32))


def test_a_scale_that_serves_rounding_alone_is_not_taken_for_gptq() -> None:
    """Without loud inputs there is little for a scale to gain that GPTQ does not gain anyway."""
    made = linear_fixture(0.0, 1.0, tokens=1024)
    consumers = [Consumer(made.weight, made.statistics, INT4)]
    losses = {}
    for method in (AWQ, AWQ_GPTQ):
        scale = search_scale(consumers, made.statistics, method)
        quantized = quantize_weight(made.weight * scale, made.statistics.scaled_inputs(scale), INT4, AWQ_GPTQ)
        losses[method] = output_error(made.weight, quantized.quantized.dequantize() / scale, made.statistics.hessian)
    plain = quantize_weight(made.weight, made.statistics, INT4, AWQ_GPTQ).quantized.dequantize()
    # rows are sampled, so the loss of the whole may exceed none's a little
    assert losses[AWQ_GPTQ] <= 1.02 * output_error(made.weight, plain, made.statistics.hessian)
    assert losses[AWQ_GPTQ] <= 1.02 * losses[AWQ]


def test_scales_stay_finite_and_positive_with_dead_and_loud_inputs() -> None:
    made = strong()
    abs_mean, hessian = made.statistics.abs_mean.clone(), made.statistics.hessian.clone()
    abs_mean[:5], hessian[:5], hessian[:, :5] = 0, 0, 0
    scale = search_scale([Consumer(made.weight, made.statistics, INT4)], Statistics(hessian, abs_mean, 100), AWQ)
    assert scale.isfinite().all() and (scale > 0).all()


def test_the_statistics_of_scaled_inputs_are_those_of_the_inputs_divided() -> None:
    inputs, scale = torch.randn(100, 16), torch.rand(16) + 0.5
    statistics = Statistics(inputs.T @ inputs / 100, inputs.abs().mean(0), 100)
    divided = inputs / scale
    mapped = statistics.scaled_inputs(scale)
    assert torch.allclose(mapped.hessian, divided.T @ divided / 100, atol=1e-5)
    assert torch.allclose(mapped.abs_mean, divided.abs().mean(0), atol=1e-6)

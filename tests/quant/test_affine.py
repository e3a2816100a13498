from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vl2.errors import VL2Error
from vl2.quant.affine import SMALLEST_SCALE, absmax_scales, dequantize, quantize, shrink_scales

shapes = st.tuples(st.integers(1, 9), st.integers(1, 6), st.sampled_from((1, 2, 16, 32)))


def random_weight(shape: tuple[int, int, int], seed: int, magnitude: float) -> torch.Tensor:
    rows, groups, size = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, groups * size, generator=generator) * 10.0**magnitude


@given(shapes, st.integers(0, 1000), st.floats(-2, 3), st.sampled_from((4, 8)))
@settings(max_examples=60, deadline=None)
def test_rounding_errs_by_half_a_step_at_most(shape, seed, magnitude, bits) -> None:
    weight = random_weight(shape, seed, magnitude)
    scales = absmax_scales(weight, shape[2], bits)
    error = (dequantize(quantize(weight, scales, bits), scales).double() - weight.double()).abs()
    half_step = scales.double().repeat_interleave(shape[2], dim=1) / 2
    # the quotient is rounded to float32 before it is rounded to a code
    assert (error <= half_step * (1 + 1e-5)).all()


@given(shapes, st.integers(0, 1000), st.floats(-30, 3), st.sampled_from((4, 8)))
@settings(max_examples=60, deadline=None)
def test_scales_are_finite_positive_and_normal_for_any_magnitude(shape, seed, magnitude, bits) -> None:
    scales = absmax_scales(random_weight(shape, seed, magnitude), shape[2], bits)
    for candidate in (scales, shrink_scales(scales, 0.65)):
        assert candidate.dtype == torch.float16 and candidate.isfinite().all()
        assert (candidate.float() >= SMALLEST_SCALE).all()


def test_codes_stay_in_range_when_scales_are_too_small() -> None:
    weight = torch.tensor([[-100.0, 100.0]])
    assert quantize(weight, torch.ones(1, 1).half(), 4).tolist() == [[-8, 7]]


def test_a_group_of_zeros_has_scale_one_and_codes_zero() -> None:
    weight = torch.zeros(2, 64)
    weight[1, 40] = 3.0
    scales = absmax_scales(weight, 32, 4)
    assert scales[0].tolist() == [1.0, 1.0] and scales[1, 0] == 1.0
    assert quantize(weight, scales, 4).nonzero().tolist() == [[1, 40]]


def test_values_on_the_grid_survive_unchanged() -> None:
    codes = torch.randint(-8, 8, (5, 96), dtype=torch.int8)
    scales = torch.rand(5, 3).half() + 0.5
    weight = dequantize(codes, scales)
    assert torch.equal(quantize(weight, scales, 4), codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.randn(4, 32)
    weight[2, 7] = bad
    with pytest.raises(VL2Error, match="NaN or infinity"):
        absmax_scales(weight, 32, 4)


def test_a_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(VL2Error, match="beyond float16"):
        absmax_scales(torch.full((1, 32), 1e7), 32, 4)

"""Weights and inputs with the traits of a language model's, for the numeric bars of the quantization guide."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vl2.quant.statistics import Statistics


class Fixture(NamedTuple):
    """weight [N, K]; statistics of the calibration inputs; the test inputs' second moments [K, K]."""

    weight: Tensor
    statistics: Statistics
    test_hessian: Tensor


def statistics_of(inputs: Tensor) -> Statistics:
    """inputs: [T, K]; T may be 0."""
    if len(inputs) == 0:
        size = inputs.shape[1]
        return Statistics(torch.zeros(size, size), torch.zeros(size), 0)
    return Statistics(inputs.T @ inputs / len(inputs), inputs.abs().mean(0), len(inputs))


def random_weight(rows: int, columns: int, seed: int) -> Tensor:
    """Student-t weights with a spread over rows and columns."""
    torch.manual_seed(seed)
    weight = torch.distributions.StudentT(6.0).sample((rows, columns)) * 0.02
    return weight * (torch.randn(rows, 1) * 0.3).exp() * (torch.randn(columns) * 0.2).exp()


def random_inputs(tokens: int, columns: int, outliers: float, gain: float) -> Tensor:
    """[tokens, columns]: a power-law spectrum in a random basis, normalised tokens, a few loud channels."""
    basis = torch.linalg.qr(torch.randn(columns, columns)).Q
    spectrum = torch.arange(1, columns + 1).float().pow(-0.4)
    inputs = (torch.randn(tokens, columns) * spectrum) @ basis
    inputs = inputs / inputs.square().mean(-1, keepdim=True).sqrt()
    gains = (torch.randn(columns) * 0.3).exp()
    gains[torch.randperm(columns)[: max(1, int(outliers * columns))]] *= gain
    return inputs * gains


def linear_fixture(outliers: float, gain: float, seed: int = 0, tokens: int = 2048) -> Fixture:
    """[128, 256]; as many test as calibration tokens."""
    weight = random_weight(128, 256, seed)
    inputs = random_inputs(2 * tokens, 256, outliers, gain)
    return Fixture(weight, statistics_of(inputs[:tokens]), statistics_of(inputs[tokens:]).hessian)


def strong() -> Fixture:
    """1 % of the channels × 12."""
    return linear_fixture(0.01, 12.0)


def mild() -> Fixture:
    """0.5 % of the channels × 4."""
    return linear_fixture(0.005, 4.0)


def swiglu_down(tokens: int, seed: int = 0) -> Fixture:
    """[128, 192] behind silu(g) · u of random gate and up matrices; 16,384 test tokens."""
    weight = random_weight(128, 192, seed)
    gate, up = (torch.randn(192, 128) / 128**0.5 for _ in range(2))
    inputs = random_inputs(tokens + 16384, 128, 0.01, 4.0)
    hidden = F.silu(inputs @ gate.T) * (inputs @ up.T)
    return Fixture(weight, statistics_of(hidden[:tokens]), statistics_of(hidden[tokens:]).hessian)

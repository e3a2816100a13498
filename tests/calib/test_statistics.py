from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calib.reference import weighted_hessian
from tests.tolerances import UNIT, assert_close
from vl2.calib import statistics
from vl2.calib.statistics import Moments, SiteSum, StatisticsOptions, modality_weights, token_weights
from vl2.errors import VL2Error

SEEDS = st.integers(0, 2**31)


def random_tokens(seed: int, tokens: int, size: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, size, generator=generator) * torch.rand(size, generator=generator) * 10
    return x, torch.randint(0, 2, (tokens,), generator=generator, dtype=torch.uint8), torch.rand(
        tokens, generator=generator)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, tokens=st.integers(1, 60), cut=st.integers(0, 60))
def test_sums_equal_the_definition_however_the_tokens_are_split(seed: int, tokens: int, cut: int) -> None:
    x, modality, a = random_tokens(seed, tokens)
    total = SiteSum.empty(7)
    for part in (slice(0, cut), slice(cut, None)):
        total.add(x[part], modality[part], a[part])
    found = total.tensors("site")
    assert_close(found["site.hessian"], weighted_hessian(x, a), UNIT)
    assert_close(found["site.abs_mean"], (a.double()[:, None] * x.double().abs()).sum(0) / a.double().sum(), UNIT)
    assert found["site.tokens"].tolist() == [int((modality == kind).sum()) for kind in (0, 1)]


def test_rows_beyond_the_chunk_are_summed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    x, modality, a = random_tokens(1, 50)
    whole, pieces = SiteSum.empty(7), SiteSum.empty(7)
    whole.add(x, modality, a)
    monkeypatch.setattr(statistics, "ROWS_AT_ONCE", 8)
    pieces.add(x, modality, a)
    assert_close(pieces.tensors("s")["s.hessian"], whole.tensors("s")["s.hessian"], UNIT)
    assert pieces.tokens.equal(whole.tokens)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, tokens=st.integers(1, 40))
def test_hessians_are_symmetric_and_have_no_negative_eigenvalue(seed: int, tokens: int) -> None:
    x, modality, a = random_tokens(seed, tokens)
    total = SiteSum.empty(7)
    total.add(x, modality, a)
    hessian = total.tensors("s")["s.hessian"].double()
    assert_close(hessian, hessian.T, UNIT)
    assert torch.linalg.eigvalsh(hessian).min() > -1e-5 * hessian.trace()


def test_a_site_without_tokens_gives_zeros_and_no_nan() -> None:
    for name, tensor in SiteSum.empty(3).tensors("s").items():
        assert not tensor.any(), name
    for name, tensor in Moments.empty(3).tensors("s").items():
        assert not tensor.any(), name


def test_announced_shapes_are_those_of_the_tensors() -> None:
    found = SiteSum.empty(5).tensors("s")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in found.items()} == SiteSum.shapes("s", 5)


@settings(max_examples=30, deadline=None)
@given(text=st.integers(1, 500), image=st.integers(1, 500))
def test_balance_gives_each_modality_half_of_the_weight(text: int, image: int) -> None:
    modality = torch.tensor([0] * text + [1] * image, dtype=torch.uint8)
    a = token_weights(modality, StatisticsOptions())
    assert_close(a[modality == 0].sum(), (text + image) / 2, UNIT)
    assert_close(a[modality == 1].sum(), (text + image) / 2, UNIT)
    assert modality_weights(modality, a) == [float(a[0]), float(a[-1])]


@pytest.mark.parametrize("modality, options", [
    ([0, 1, 1], StatisticsOptions(balance="none")), ([0, 0], StatisticsOptions()), ([1], StatisticsOptions())])
def test_without_balance_or_with_one_modality_all_tokens_count_alike(
    modality: list[int], options: StatisticsOptions
) -> None:
    assert token_weights(torch.tensor(modality, dtype=torch.uint8), options).tolist() == [1.0] * len(modality)


@pytest.mark.parametrize("options", [{"balance": "half"}, {"token_weight": "p"}])
def test_unknown_options_are_refused(options: dict) -> None:
    with pytest.raises(VL2Error, match="expected one of"):
        StatisticsOptions(**options)


def test_the_diagonal_of_moments_is_that_of_the_sum() -> None:
    x, modality, _ = random_tokens(3, 40)
    total, moments, rest = SiteSum.empty(7), Moments.empty(7), Moments.empty(7)
    total.add(x, modality, torch.ones(40))
    moments.add(x[:11])
    rest.add(x[11:])
    moments += rest
    found, want = moments.tensors("s"), total.tensors("s")
    assert_close(found["s.hessian_diag"], want["s.hessian"].diagonal(), UNIT)
    assert_close(found["s.abs_mean"], want["s.abs_mean"], UNIT)
    assert found["s.tokens"].tolist() == [0, 40]

"""bitsandbytes' forms against slow references, and the count of what they replace."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.quant.synthetic import random_weight
from vl2.errors import VL2Error
from vl2.model.checkpoint import load_model, parameter_sources
from vl2.quant.baselines import BASELINES, Rounded, bnb_int8, nf4, replace_matrices
from vl2.quant.linears import expert_of
from vl2.quant.recipe import assign_schemes, builtin_recipe

# The 16 values of NF4, arXiv 2305.14314, appendix E.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip


@pytest.fixture(scope="module")
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


def slow_nf4(weight: Tensor) -> Tensor:
    """Number by number: the nearest table value times the greatest magnitude of its 64 neighbours."""
    numbers, found = weight.flatten().tolist(), []
    for start in range(0, len(numbers), 64):
        block = numbers[start : start + 64]
        absmax = max(abs(number) for number in block)
        found += [absmax * min(NF4, key=lambda value: abs(value - number / (absmax or 1))) for number in block]
    return torch.tensor(found).view(weight.shape)


def slow_int8(weight: Tensor) -> Tensor:
    rows = []
    for row in weight.half().float().tolist():
        absmax = max(abs(number) for number in row)
        rows.append([round(number * 127 / absmax) * absmax / 127 for number in row])
    return torch.tensor(rows)


@pytest.mark.parametrize("shape", [(24, 128), (5, 33)])
def test_nf4_is_the_nearest_table_value_in_blocks_of_64(bitsandbytes, shape: tuple[int, int]) -> None:
    weight = random_weight(*shape, seed=3)
    rounded = nf4(weight)
    torch.testing.assert_close(rounded.weight, slow_nf4(weight), rtol=1e-6, atol=0)  # a float32 product apart
    numbers = math.prod(shape)
    assert rounded.size_bytes == -(-numbers // 2) + 4 * -(-numbers // 64)


def test_nf4_of_bfloat16_is_that_of_the_same_numbers_in_float32(bitsandbytes) -> None:
    weight = random_weight(8, 64, seed=4).bfloat16()
    assert torch.equal(nf4(weight).weight, nf4(weight.float()).weight)


def test_nf4_of_zeros_is_zeros(bitsandbytes) -> None:
    assert torch.equal(nf4(torch.zeros(2, 64)).weight, torch.zeros(2, 64))


def test_bnb_int8_is_the_nearest_127th_of_the_rows_greatest(bitsandbytes) -> None:
    weight = random_weight(24, 128, seed=5)
    rounded = bnb_int8(weight)
    step = weight.half().float().abs().amax(1, keepdim=True) / 127
    # Ties and quotients at them may round either way; everything else is equal to a float32 product.
    apart = ((rounded.weight - slow_int8(weight)) / step).abs()
    assert float(apart.max()) <= 1.001 and float((apart > 1e-3).float().mean()) < 0.01
    assert float(((rounded.weight - weight.half().float()) / step).abs().max()) <= 0.501
    assert rounded.size_bytes == 24 * 128 + 4 * 24


def test_bnb_int8_refuses_what_float16_cannot_hold(bitsandbytes) -> None:
    with pytest.raises(VL2Error, match="float16"):
        bnb_int8(torch.full((1, 64), 1e5))


@pytest.mark.parametrize("quantize", [nf4, bnb_int8])
def test_without_bitsandbytes_the_extra_is_named(quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(VL2Error) as refused:
        quantize(torch.ones(1, 64))
    assert "'.[baselines]'" in refused.value.hint


def halved(weight: Tensor) -> Rounded:
    return Rounded(weight / 2, 1)


@pytest.mark.parametrize("name", ["tiny-mini", "base-mini"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_every_matrix_of_the_recipe_is_replaced_once_and_nothing_else(goldens: Path, name: str, baseline: str) -> None:
    model = load_model(goldens / name)
    after = model.state_dict()
    before = {key: value.clone() for key, value in after.items()}
    recipe, by_bits = BASELINES[baseline].recipe, BASELINES[baseline].by_bits
    schemes = assign_schemes(builtin_recipe(recipe, model.config), model.config)
    sizes = replace_matrices(model, schemes, dict.fromkeys(by_bits, halved))
    language = model.config.language_config
    sparse = {expert_of(module)[0] for module in sizes if expert_of(module)}
    assert len([module for module in sizes if expert_of(module)]) == len(sparse) * language.n_routed_experts * 3
    for key, sources in parameter_sources(model.config).items():
        for index, source in enumerate(sources):
            old, new = ((value if len(sources) == 1 else value[index]) for value in (before[key], after[key]))
            assert torch.equal(new, old / 2 if source.removesuffix(".weight") in sizes else old), source


def test_a_matrix_that_the_model_does_not_have_is_an_error(goldens: Path) -> None:
    model = load_model(goldens / "tiny-mini")
    schemes = assign_schemes(builtin_recipe("int4", model.config), model.config)
    scheme = next(scheme for scheme in schemes.values() if scheme is not None)
    with pytest.raises(VL2Error, match="missing_proj"):
        replace_matrices(model, schemes | {"language.model.missing_proj": scheme}, {4: halved, 8: halved})

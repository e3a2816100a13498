"""The knapsack of bits against brute force, and what its groups and recipes must be."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import GOLDENS, MINI_CHECKPOINTS
from vl2.config import load_config
from vl2.errors import VL2Error
from vl2.quant.budget import Item, Option, allocate, hull, refuse_needless
from vl2.quant.groups import decided_recipe, decision_groups, option_schemes
from vl2.quant.linears import is_router
from vl2.quant.recipe import assign_schemes

OPTION = st.tuples(st.integers(1, 60), st.floats(0, 4, allow_nan=False))
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5).map(
    lambda found: [Item(f"g{i}", tuple(Option(str(j), *pair) for j, pair in enumerate(options)))
                   for i, options in enumerate(found)])


def smallest(items: list[Item]) -> int:
    return sum(min(option.size_bytes for option in item.options) for item in items)


def largest(items: list[Item]) -> int:
    return sum(max(option.size_bytes for option in item.options) for item in items)


def optimum(items: list[Item], budget: int) -> float:
    fitting = (found for found in product(*(item.options for item in items))
               if sum(option.size_bytes for option in found) <= budget)
    return min(sum(option.kld for option in found) for found in fitting)


@given(ITEMS, st.floats(0, 1))
def test_the_allocation_fits_and_is_the_optimum_up_to_one_demotion(items: list[Item], share: float) -> None:
    budget = smallest(items) + int(share * (largest(items) - smallest(items)))
    found, best = allocate(items, budget), optimum(items, budget)
    assert found.size_bytes == sum(option.size_bytes for option in found.chosen.values()) <= budget
    assert found.chosen.keys() == {item.name for item in items}
    assert best - 1e-9 <= found.kld <= best + found.gap + 1e-9


@given(ITEMS, st.integers(0, 200), st.integers(0, 200))
def test_a_larger_budget_never_predicts_a_larger_loss(items: list[Item], less: int, more: int) -> None:
    budget = smallest(items) + less
    assert allocate(items, budget + more).kld <= allocate(items, budget).kld + 1e-12


@given(ITEMS)
def test_what_everything_fits_into_takes_the_best_of_each(items: list[Item]) -> None:
    found = allocate(items, largest(items))
    assert found.kld == pytest.approx(sum(min(option.kld for option in item.options) for item in items))
    assert found.gap == 0


@given(ITEMS)
def test_the_loss_a_byte_rises_along_a_hull(items: list[Item]) -> None:
    for item in items:
        found = hull(item)
        assert found[-1].size_bytes == min(option.size_bytes for option in item.options)
        slopes = [(b.kld - a.kld) / (a.size_bytes - b.size_bytes) for a, b in zip(found, found[1:], strict=False)]
        assert all(first <= second + 1e-9 for first, second in zip(slopes, slopes[1:], strict=False))


def test_an_impossible_budget_names_the_smallest_size() -> None:
    items = [Item("experts", (Option("int8", 2_000_000, 0.1), Option("int4", 1_000_000, 0.2)))]
    with pytest.raises(VL2Error, match=r"1\.000 MB \(1000000 bytes\)") as caught:
        allocate(items, 999_999)
    assert "at least 1.000 MB" in caught.value.hint


@pytest.mark.parametrize("name", MINI_CHECKPOINTS)
def test_every_option_of_every_group_is_a_recipe_and_none_below_int8_where_that_hurts(name: str) -> None:
    config = load_config(GOLDENS / name)
    groups = decision_groups(config, {})
    for group in groups:
        for option in group.options:
            schemes = option_schemes(group, option, config)
            changed = {module for module, scheme in schemes.items() if scheme is not None}
            assert bool(changed) == (option != "keep") and not any(is_router(module) for module in changed)
            assert not any(module.startswith("projector") for module in changed)
            low = {module for module in changed if schemes[module].bits < 8}
            assert not [module for module in low if not module.startswith("language.model.layers.") or "kv_a" in module]
    smallest = {group.name: group.options[-1] for group in groups}
    covered = assign_schemes(decided_recipe("all", groups, smallest, config), config)
    assert {module for module, scheme in covered.items() if scheme is None} == {
        module for module in covered if is_router(module) or module.startswith("projector")}


def test_what_the_user_decided_is_no_longer_open() -> None:
    groups = decision_groups(load_config(GOLDENS / "tiny-mini"), {"vision": "int8", "lm_head": "fp16"})
    options = {group.name: group.options for group in groups}
    assert options["vision"] == ("int8-channel",) and options["lm_head"] == ("keep",)
    assert options["embeddings"] == ("keep", "int8-channel")


def test_a_budget_that_everything_fits_into_unquantized_is_refused_with_what_to_do() -> None:
    open_items = [Item(name, (Option("keep", 2_000_000, 0.0), Option("int8", 1_000_000, 0.1))) for name in "ab"]
    with pytest.raises(VL2Error, match=r"fits unquantized: 4\.500 MB \(4500000 bytes\).*budget is 4\.500 MB") as caught:
        refuse_needless(open_items, 4_500_000, fixed_bytes=500_000)
    assert "vl2 export --scheme fp16" in caught.value.hint
    refuse_needless(open_items, 4_499_999, fixed_bytes=500_000)
    decided = [Item("vision", (Option("int8-channel", 1_000_000, 0.1),)), *open_items]
    refuse_needless(decided, 9_000_000)

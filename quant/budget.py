"""Which group of matrices gets how many bits, so that all fit a size and the predicted loss is least.

Losses of groups add up while they are small (HIGGS, 2411.17525), which makes this a multiple-choice knapsack. It is
solved along convex hulls: from the best options on, always the demotion that loses least a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vl2.errors import VL2Error
from vl2.quant.recipe import KEEP


@dataclass(frozen=True)
class Option:
    """One way to store a group: its size in bytes and the mean KLD, nats, of the model with only this group so."""

    name: str
    size_bytes: int
    kld: float


@dataclass(frozen=True)
class Item:
    """A group and its options, at least one."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Allocation:
    """The option of every item by its name; sums of sizes (what is fixed included) and losses.

    gap: what the KLD may be above the optimum's, the loss of one demotion.
    """

    chosen: dict[str, Option]
    size_bytes: int
    kld: float
    gap: float


def allocate(items: Sequence[Item], budget_bytes: int, fixed_bytes: int = 0) -> Allocation:
    """The options with the least Σ KLD whose sizes fit beside `fixed_bytes`, at most `gap` above the optimum.

    Of the hulls' demotions, ordered by loss a byte, as many as are needed; then the one replacement of an option that
    still fits and gains most, tried on every fitting prefix of the demotions, which makes the KLD never larger at a
    larger budget. Raises VL2Error naming the smallest size that can be reached.
    """
    smallest = fixed_bytes + sum(min(option.size_bytes for option in item.options) for item in items)
    if smallest > budget_bytes:
        raise VL2Error(f"the budget is {_size(budget_bytes)}, and the smallest that can be reached is "
                       f"{_size(smallest)} ({smallest} bytes)",
                       f"give a budget of at least {_size(smallest)}, or leave out options that keep parts in FP16")
    chain, free = _chain(items), budget_bytes - fixed_bytes
    fitting = [found for found in chain if _sum(found)[0] <= free]
    passed = chain[len(chain) - len(fitting) - 1] if len(fitting) < len(chain) else None
    gap = 0.0 if passed is None else _sum(fitting[0])[1] - _sum(passed)[1]
    best = min((_improved(items, found, free) for found in fitting), key=lambda found: _sum(found)[::-1])
    size, kld = _sum(best)
    return Allocation({item.name: option for item, option in zip(items, best, strict=True)}, fixed_bytes + size, kld,
                      max(gap, 0.0))


def refuse_needless(items: Sequence[Item], budget_bytes: int, fixed_bytes: int = 0) -> None:
    """Raises VL2Error where every item may be kept and all fit so: `allocate` would choose a recipe that quantizes
    nothing, after hours of measuring."""
    kept = [option.size_bytes for item in items for option in item.options if option.name == KEEP]
    size = fixed_bytes + sum(kept)
    if len(kept) == len(items) and size <= budget_bytes:
        raise VL2Error(f"everything fits unquantized: {_size(size)} ({size} bytes), and the budget is "
                       f"{_size(budget_bytes)}",
                       f"`vl2 export --scheme fp16` quantizes nothing; or give a budget below {_size(size)}")


def _chain(items: Sequence[Item]) -> list[list[Option]]:
    """From every item's best option to its smallest, one demotion at a time."""
    hulls = [hull(item) for item in items]
    steps = [(_slope(*pair), index, place + 1) for index, found in enumerate(hulls)
             for place, pair in enumerate(pairwise(found))]
    current = [found[0] for found in hulls]
    chain = [list(current)]
    for _, index, place in sorted(steps):
        current[index] = hulls[index][place]
        chain.append(list(current))
    return chain


def hull(item: Item) -> list[Option]:
    """The options from the least KLD (of equals the smallest) to the smallest size that no mixture of two others
    beats: the loss a byte rises along them."""
    current = min(item.options, key=lambda option: (option.kld, option.size_bytes))
    found = [current]
    while smaller := [option for option in item.options if option.size_bytes < current.size_bytes]:
        current = min(smaller, key=lambda option: (_slope(found[-1], option), option.size_bytes))
        found.append(current)
    return found


def _slope(larger: Option, smaller: Option) -> float:
    return (smaller.kld - larger.kld) / (larger.size_bytes - smaller.size_bytes)


def _improved(items: Sequence[Item], current: list[Option], budget_bytes: int) -> list[Option]:
    """`current` with the one replacement that gains most and fits, or as it is."""
    free = budget_bytes - _sum(current)[0]
    gains = [(old.kld - option.kld, -option.size_bytes, index, option)
             for index, (item, old) in enumerate(zip(items, current, strict=True))
             for option in item.options if option.size_bytes - old.size_bytes <= free and option.kld < old.kld]
    if not gains:
        return current
    _, _, index, option = max(gains, key=lambda gain: gain[:3])
    return [*current[:index], option, *current[index + 1 :]]


def _sum(options: Sequence[Option]) -> tuple[int, float]:
    return sum(option.size_bytes for option in options), sum(option.kld for option in options)


def _size(count: int) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 1e8 else f"{count / 1e6:.3f} MB"

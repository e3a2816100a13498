"""What a graph's initializers hold: a parameter, one expert of it, or a rearranged part of either."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

# One rearrangement: its name in LAYOUT_STEPS and its arguments.
LayoutStep = tuple[str, tuple[int, ...]]

LAYOUT_STEPS: dict[str, Callable[..., Tensor]] = {
    "reshape": lambda tensor, *shape: tensor.reshape(shape),
    "permute": lambda tensor, *axes: tensor.permute(axes),
    "narrow": lambda tensor, axis, start, length: tensor.narrow(axis, start, length),
}


@dataclass(frozen=True)
class Weight:
    """Where an initializer's numbers come from.

    parameter: the model's name; shape: of the initializer; expert: row of a stacked parameter, if only one is held;
    layout: what is done to the parameter (or its row) to get the initializer, in order.
    """

    parameter: str
    shape: tuple[int, ...]
    expert: int | None = None
    layout: tuple[LayoutStep, ...] = ()

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def of_expert(self, expert: int) -> Weight:
        """One row of a stacked parameter."""
        assert self.expert is None and not self.layout, f"{self.parameter} is not a whole stacked parameter"
        return replace(self, shape=self.shape[1:], expert=expert)

    def row_blocks(self, rows: int) -> list[Weight]:
        """The same numbers as several weights of at most `rows` rows each."""
        first, kept = self._rows_of_parameter()
        starts = range(0, self.shape[0], rows)
        lengths = [min(rows, self.shape[0] - start) for start in starts]
        return [
            replace(
                self, shape=(length, *self.shape[1:]), layout=(*kept, ("narrow", (0, first + start, length)))
            )
            for start, length in zip(starts, lengths, strict=True)
        ]

    @property
    def input_axis(self) -> int:
        """Where the inputs (K, the parameter's last side) lie after the layout."""
        axis = len(self.shape) - 1
        for step, arguments in self.layout:
            if step == "permute":
                axis = arguments.index(axis)
        return axis

    def with_inputs(self, count: int) -> Weight:
        """The same rearrangement of a tensor whose last side is `count` instead of K: its scales."""
        layout = []
        for step, arguments in self.layout:
            if step == "reshape":
                arguments = (*arguments[:-1], count)
            layout.append((step, arguments))
        axis = self.input_axis
        return replace(self, shape=(*self.shape[:axis], count, *self.shape[axis + 1 :]), layout=tuple(layout))

    def _rows_of_parameter(self) -> tuple[int, tuple[LayoutStep, ...]]:
        """The first row held, and the layout without the step that chooses rows: rows of rows are rows."""
        if self.layout and self.layout[-1][0] == "narrow" and self.layout[-1][1][0] == 0:
            return self.layout[-1][1][1], self.layout[:-1]
        return 0, self.layout

    def then(self, step: LayoutStep, shape: tuple[int, ...]) -> Weight:
        """The same numbers after one more rearrangement, which gives `shape`."""
        return replace(self, shape=shape, layout=(*self.layout, step))


def arrange(tensor: Tensor, layout: tuple[LayoutStep, ...]) -> Tensor:
    """Does the rearrangements, in order."""
    for name, arguments in layout:
        tensor = LAYOUT_STEPS[name](tensor, *arguments)
    return tensor

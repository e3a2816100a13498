"""What was measured so far: weights, outputs, blocks and routers, by name. Grows part by part and survives as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vl2.layerwise.sums import KINDS, Sums

# Of a router and a kind of position: positions, those whose set of experts changed as both models ran, and those whose
# set changed on the reference's own input.
_ROUTER_COLUMNS = 3


@dataclass
class Ledger:
    """weights: tensor → its `WeightSums.figure`; unchanged: tensors that are the same in both; outputs: matrix → Sums
    of its output on the reference's inputs; own: block → Sums of what it adds, both fed with the reference's input;
    stream: block → Sums of what leaves it as both models run; routers: layer → int [2, 3]."""

    weights: dict[str, dict[str, float | None]] = field(default_factory=dict)
    unchanged: set[str] = field(default_factory=set)
    outputs: dict[str, Sums] = field(default_factory=dict)
    own: dict[str, Sums] = field(default_factory=dict)
    stream: dict[str, Sums] = field(default_factory=dict)
    routers: dict[int, np.ndarray] = field(default_factory=dict)

    def sums(self, table: str, name: str) -> Sums:
        """The Sums of `name` in "outputs", "own" or "stream", empty at first."""
        return getattr(self, table).setdefault(name, Sums())

    def add_router(self, l: int, counts: np.ndarray) -> None:
        """counts: int [2, 3], text and image: positions, changed, changed on the reference's input."""
        self.routers[l] = self.routers.get(l, np.zeros((len(KINDS), _ROUTER_COLUMNS), np.int64)) + counts

    def __iadd__(self, other: Ledger) -> Ledger:
        self.weights |= other.weights
        self.unchanged |= other.unchanged
        for table in ("outputs", "own", "stream"):
            for name, sums in getattr(other, table).items():
                mine = self.sums(table, name)
                mine += sums
        for l, counts in other.routers.items():
            self.add_router(l, counts)
        return self

    def to_json(self) -> dict[str, Any]:
        """Exact: JSON writes a float64 so that it is read back as the same number."""
        tables = {table: {name: sums.values.tolist() for name, sums in getattr(self, table).items()}
                  for table in ("outputs", "own", "stream")}
        routers = {str(l): counts.tolist() for l, counts in self.routers.items()}
        return {"weights": self.weights, "unchanged": sorted(self.unchanged), **tables, "routers": routers}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Ledger:
        tables = {table: {name: Sums(rows) for name, rows in values[table].items()}
                  for table in ("outputs", "own", "stream")}
        routers = {int(l): np.array(counts, np.int64) for l, counts in values["routers"].items()}
        return Ledger(values["weights"], set(values["unchanged"]), **tables, routers=routers)

"""The one shape that every backend has: it runs a bundle's graphs on NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

Arrays = Mapping[str, np.ndarray]


class Backend(Protocol):
    """Runs graphs by name, such as "vision" and "decoder"."""

    @property
    def description(self) -> str:
        """Where the graphs run, in one line."""
        ...

    def load(self, graph: str) -> None:
        """Makes a graph ready to run; nothing when it is."""
        ...

    def run(self, graph: str, feeds: Arrays, results: Arrays) -> None:
        """Runs one graph on `feeds` and writes its outputs into the given `results`, all C-contiguous.

        A graph that is not loaded is loaded first; `results` never overlap `feeds`.
        """
        ...

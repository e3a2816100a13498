"""How many bytes one decode step reads: what memory has to deliver for a token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vl2.manifest import read_manifest
from vl2.planning.models import planned_model

COUNTING = ("weights as stored that one token needs, once each: every matrix of the decoder, of the routed experts as "
            "many as routing selects, not the token table; and the cache entries of all positions")


@dataclass(frozen=True)
class Traffic:
    """weights: bytes a step by module; cache_position: bytes of one position of the cache in all layers."""

    weights: dict[str, int]
    cache_position: int

    def step_bytes(self, positions: float) -> int:
        """Of one decode step with `positions` entries in the cache."""
        return sum(self.weights.values()) + round(positions * self.cache_position)


def traffic_of(bundle: Path) -> Traffic:
    """From the manifest's sizes by module and ports of the cache, and the experts a token of config.json.

    Raises VL2Error for what is no bundle.
    """
    read = planned_model(str(bundle)).storage.read
    return Traffic({module: round(size) for module, size in read.items()}, _cache_position(bundle))


def _cache_position(bundle: Path) -> int:
    graph = read_manifest(bundle).graphs["decoder"]
    ports = {port.name: port for port in graph.inputs}
    caches = [ports[pair.past] for pair in graph.cache]
    return sum(math.prod(port.shape[2:]) * np.dtype(port.dtype).itemsize for port in caches)

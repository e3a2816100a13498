"""A bundle's graph in onnxruntime, as plainly as possible: for verification, not for speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from vl2.export.engine_emulation import EmulatedSession
from vl2.manifest import Manifest
from vl2.operators import register_operators

Cache = list[np.ndarray]

_ERRORS_ONLY = 3


class GraphSession:
    """Runs a graph with its weights memory-mapped."""

    def __init__(self, folder: Path, manifest: Manifest, name: str):
        graph = self._graph = manifest.graphs[name]
        if manifest.lowering == "trt":
            weights = folder / graph.data_file if name == "decoder" else None
            self._session = EmulatedSession(folder / graph.file, weights)
            return
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        # A packed copy of float32 weights would take their size again, on top of the map. MatMulNBits reads packed
        # copies only: without them it expands the whole matrix in every call.
        options.add_session_config_entry("session.disable_prepacking", "0" if manifest.lowering == "ort" else "1")
        if manifest.lowering == "cpu":
            register_operators(options, folder)
        # an arena would keep the largest step's memory for as long as the session lives
        options.enable_cpu_mem_arena = False
        self._session = onnxruntime.InferenceSession(str(folder / graph.file), options, ["CPUExecutionProvider"])

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Outputs in the order of the graph, for inputs in its order."""
        names = [port.name for port in self._graph.inputs]
        return self._session.run(None, dict(zip(names, inputs, strict=True)))

    def prefill(self, embeds: np.ndarray, chunk: int, room: int = 0) -> tuple[np.ndarray, Cache]:
        """Logits [1, V] behind the embeddings [T, H] and the cache, computed `chunk` positions at a time.

        room: positions that `step` will add; caches written in place have no more.
        """
        cache = self._empty_cache(len(embeds) + room)
        for start in range(0, len(embeds), chunk):
            logits, cache = self.step(embeds[start : start + chunk], start, cache)
        return logits, cache

    def step(self, embeds: np.ndarray, start: int, cache: Cache) -> tuple[np.ndarray, Cache]:
        """Logits [1, V] and the grown cache, for embeddings [T, H] at positions from `start` on."""
        end = start + len(embeds)
        inputs = [embeds[None], np.arange(start, end)[None]]
        if self._graph.slots:
            return self.run([*inputs, np.array([start]), np.array([0]), *cache])[0], cache
        if self._graph.in_place:
            return self.run([*inputs, np.array(start), *cache])[0], cache
        logits, *new = self.run([*inputs, np.ones((1, end), bool), *cache])
        return logits, [np.concatenate(pair, axis=1) for pair in zip(cache, new, strict=True)]

    def _empty_cache(self, capacity: int) -> Cache:
        past, length = {ports.past for ports in self._graph.cache}, capacity if self._graph.in_place else 0
        ports = [port for port in self._graph.inputs if port.name in past]
        return [np.zeros((1, length, *port.shape[2:]), port.dtype) for port in ports]

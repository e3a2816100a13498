"""Whether several sequences decode faster as one batch: `python benchmarks/batched_decode.py BUNDLE`.

Times one decode step of the decoder graph for batches of 1, 2, 4 and 8 sequences in interleaved rounds, each row with a
token of its own, so that rows choose experts of their own. In bundles with slots (lowering `cpu`) the sequences are
unequally long, half to one and a half times `--past`, and lie in rows of one buffer in any order; other graphs take
equal lengths only: what they could gain at most. Prints a table of medians, then one JSON line. Times are processor
time with `--threads 1`, so that neighbours on the core count little, else time on the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vl2.manifest import CACHE_ROW
from vl2.runtime import BundleOptions, open_bundle
from vl2.runtime.model import Model

BATCHES = (1, 2, 4, 8)


def make_caches(model: Model, past: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Buffers of as many sequences as the largest batch has, filled with small noise."""
    graph = model.manifest.graphs["decoder"]
    ports, length = {port.name: port for port in graph.inputs}, 2 * past if graph.slots else past + graph.in_place
    caches = {}
    for pair in graph.cache:
        shape, dtype = (max(BATCHES), length, *ports[pair.past].shape[2:]), ports[pair.past].dtype
        noise = rng.integers(-9, 10, shape) if dtype == "int8" else 0.1 * rng.standard_normal(shape, np.float32)
        caches[pair.past] = noise.astype(dtype)
    return caches


def step_feeds(model: Model, batch: int, past: int, caches: dict, rng: np.random.Generator) -> tuple[dict, dict]:
    """Inputs and result buffers of one step of `batch` sequences of `past` positions, with slots on average."""
    graph, language = model.manifest.graphs["decoder"], model.manifest.language
    tokens = rng.integers(3, language.vocab_size, batch)
    lengths = np.full(batch, past)
    if graph.slots and batch > 1:
        lengths = np.linspace(past / 2, 3 * past / 2, batch).astype(np.int64)
    feeds = {"inputs_embeds": model.engine.embeddings.lookup(tokens)[:, None], "position_ids": lengths[:, None]}
    results = {"logits": np.empty((batch, language.vocab_size), np.float32)}
    for pair in graph.cache if not graph.slots else ():
        if pair.new:
            results[pair.new] = np.empty((batch, 1, *caches[pair.past].shape[2:]), caches[pair.past].dtype)
    if graph.slots:
        return feeds | caches | {"past_length": lengths, CACHE_ROW: rng.permutation(max(BATCHES))[:batch]}, results
    sight = {"past_length": np.array(past)} if graph.in_place else {"attention_mask": np.ones((batch, past + 1), bool)}
    return feeds | {name: cache[:batch] for name, cache in caches.items()} | sight, results


def measure(model: Model, past: int, rounds: int, clock: Callable[[], float]) -> dict[int, float]:
    """Median seconds a step by batch."""
    rng = np.random.default_rng(0)
    caches = make_caches(model, past, rng)
    seconds: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for number in range(rounds + 1):
        for batch in BATCHES:
            feeds, results = step_feeds(model, batch, past, caches, rng)
            start = clock()
            model.engine.backend.run("decoder", feeds, results)
            if number:  # the first round warms up
                seconds[batch].append(clock() - start)
    return {batch: statistics.median(values) for batch, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--past", type=int, default=500, help="positions in the caches")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    model = open_bundle(options.bundle, BundleOptions(threads=options.threads))
    clock = time.process_time if options.threads == 1 else time.perf_counter
    found = measure(model, options.past, options.rounds, clock)
    print(f"{options.bundle}, {options.past} positions\nbatch   ms a step   tokens/s   of batch 1")
    for batch, seconds in found.items():
        print(f"{batch:5} {seconds * 1e3:11.2f} {batch / seconds:10.1f} {batch * found[1] / seconds:11.2f}x")
    print(json.dumps({"bundle": str(options.bundle), "past": options.past,
                      "milliseconds": {batch: round(seconds * 1e3, 3) for batch, seconds in found.items()}}))


if __name__ == "__main__":
    main()

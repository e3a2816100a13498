"""Whether several sequences decode faster as one batch: `python benchmarks/batched_decode.py BUNDLE`.

Times one decode step of the decoder graph for batches of 1, 2, 4 and 8 sequences of equal length, in interleaved
rounds, each row with a token of its own, so that rows choose experts of their own. Sequences a server holds have
unequal lengths, which the graphs do not take in one batch: the figures are what such graphs could gain at most.
Prints a table of medians, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from vl2.runtime import BundleOptions, open_bundle
from vl2.runtime.model import Model

BATCHES = (1, 2, 4, 8)


def step_feeds(model: Model, batch: int, past: int, rng: np.random.Generator) -> tuple[dict, dict]:
    """Inputs and result buffers of one step of `batch` sequences of `past` positions; caches hold small noise."""
    graph, language = model.manifest.graphs["decoder"], model.manifest.language
    tokens = rng.integers(3, language.vocab_size, batch)
    embeds = model.engine.embeddings.lookup(tokens)[:, None]
    feeds = {"inputs_embeds": embeds, "position_ids": np.full((batch, 1), past, np.int64)}
    results = {"logits": np.empty((batch, language.vocab_size), np.float32)}
    ports = {port.name: port for port in graph.inputs}
    for pair in graph.cache:
        shape, dtype = ports[pair.past].shape[2:], ports[pair.past].dtype
        length = past + 1 if graph.in_place else past
        feeds[pair.past] = (0.1 * rng.standard_normal((batch, length, *shape))).astype(dtype)
        if pair.new:
            results[pair.new] = np.empty((batch, 1, *shape), dtype)
    sight = {"past_length": np.array(past)} if graph.in_place else {"attention_mask": np.ones((batch, past + 1), bool)}
    return feeds | sight, results


def measure(model: Model, past: int, rounds: int) -> dict[int, float]:
    """Median seconds a step by batch."""
    rng = np.random.default_rng(0)
    seconds: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for number in range(rounds + 1):
        for batch in BATCHES:
            feeds, results = step_feeds(model, batch, past, rng)
            start = time.perf_counter()
            model.engine.backend.run("decoder", feeds, results)
            if number:  # the first round warms up
                seconds[batch].append(time.perf_counter() - start)
    return {batch: statistics.median(values) for batch, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--past", type=int, default=500, help="positions in the caches")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    model = open_bundle(options.bundle, BundleOptions(threads=options.threads))
    found = measure(model, options.past, options.rounds)
    print(f"{options.bundle}, {options.past} positions\nbatch   ms a step   tokens/s   of batch 1")
    for batch, seconds in found.items():
        print(f"{batch:5} {seconds * 1e3:11.2f} {batch / seconds:10.1f} {batch * found[1] / seconds:11.2f}x")
    print(json.dumps({"bundle": str(options.bundle), "past": options.past,
                      "milliseconds": {batch: round(seconds * 1e3, 3) for batch, seconds in found.items()}}))


if __name__ == "__main__":
    main()

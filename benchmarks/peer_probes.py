"""One peer measured once on a decoder, in a process of its own: `python benchmarks/peer_probes.py PEER PATH THREADS`.

Peers: `bundle` (a vl2 bundle, whatever its lowering), `llama` (a GGUF file in llama.cpp), `eager` (a checkpoint in
PyTorch, float32). Each prefills PREFILL random tokens of a fixed seed, the first time to warm up, and decodes STEPS
more, each a token of its own. Prints one JSON object: seconds of loading, prefill and a decode step (median), memory,
and the likeliest token behind the prompt, by which runs of the same weights can be told to agree.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

PREFILL, STEPS, CONTEXT = 600, 24, 1024


def tokens(vocabulary: int) -> np.ndarray:
    """int64 [PREFILL + STEPS], each position another random token."""
    return np.random.default_rng(0).integers(3, vocabulary - 16, PREFILL + STEPS)


def measured(load_seconds: float, ids: np.ndarray, start: Callable[[], None],
             step: Callable[[np.ndarray], np.ndarray]) -> dict:
    """start: empties the cache; step: logits [V] of the last of some more tokens."""
    seconds = []
    for _ in range(2):
        start()
        begun = time.perf_counter()
        logits = step(ids[:PREFILL])
        seconds.append(time.perf_counter() - begun)
    likeliest = int(logits.argmax())  # now: llama.cpp's logits are a view that the next step overwrites
    steps = []
    for token in ids[PREFILL:]:
        begun = time.perf_counter()
        step(np.array([token]))
        steps.append(time.perf_counter() - begun)
    status = Path("/proc/self/status").read_text()
    return {"load_seconds": load_seconds, "prefill_seconds": seconds[1], "first_prefill_seconds": seconds[0],
            "decode_seconds": statistics.median(steps), "likeliest": likeliest,
            "peak_rss_bytes": int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024}


def bundle(path: Path, threads: int) -> dict:
    from vl2.runtime import BundleOptions, open_bundle
    from vl2.runtime.engine import Context

    begun = time.perf_counter()
    model = open_bundle(path, BundleOptions(threads=threads, check_hashes=False))
    model.engine.backend.load("decoder")
    loaded = time.perf_counter() - begun
    contexts = [Context(model.engine)]

    def step(ids: np.ndarray) -> np.ndarray:
        if len(ids) == 1:
            return contexts[0].decode_step(int(ids[0]))
        return contexts[0].prefill(ids, model.engine.embeddings.lookup(ids), PREFILL)

    def start() -> None:
        contexts[0] = Context(model.engine)

    return measured(loaded, tokens(model.manifest.language.vocab_size), start, step)


def llama(path: Path, threads: int) -> dict:
    import llama_cpp as lib

    lib.llama_backend_init()
    begun = time.perf_counter()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, PREFILL, PREFILL
    settings.n_threads = settings.n_threads_batch = threads
    context = lib.llama_init_from_model(model, settings)
    loaded = time.perf_counter() - begun
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def step(ids: np.ndarray) -> np.ndarray:
        array = (lib.llama_token * len(ids))(*map(int, ids))
        assert lib.llama_decode(context, lib.llama_batch_get_one(array, len(ids))) == 0
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (vocabulary,))

    def start() -> None:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)

    return measured(loaded, tokens(vocabulary), start, step)


def eager(path: Path, threads: int) -> dict:
    import torch

    from vl2.model.checkpoint import load_model

    torch.set_num_threads(threads)
    begun = time.perf_counter()
    model = load_model(path).eval()
    loaded = time.perf_counter() - begun
    language, held = model.language, []

    @torch.inference_mode()
    def step(ids: np.ndarray) -> np.ndarray:
        past = held[0].shape[1] if held else 0
        positions = torch.arange(past, past + len(ids))[None]
        mask = torch.ones(1, past + len(ids), dtype=torch.bool)
        hidden, new = language(language.embed_tokens(torch.from_numpy(ids)[None]), positions, mask, tuple(held))
        held[:] = [torch.cat([old, more], 1) for old, more in zip(held, new, strict=True)] if held else list(new)
        return language.logits(hidden[:, -1:])[0, 0].numpy()

    def start() -> None:
        held.clear()

    return measured(loaded, tokens(language.embed_tokens.num_embeddings), start, step)


if __name__ == "__main__":
    peer, path, threads = sys.argv[1:]
    print(json.dumps({"bundle": bundle, "llama": llama, "eager": eager}[peer](Path(path), int(threads))))

"""Both attentions through their launch plans, emulated, against the eager operators in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.plugins.cuda.weights import half
from tests.tolerances import CUDA_ATTENTION, max_difference
from vl2.errors import VL2Error
from vl2.plugins.attention.op import attention
from vl2.plugins.cuda.attention import AttentionProblem, attention_plan
from vl2.plugins.cuda.latent import LatentProblem, latent_plan
from vl2.plugins.latent_attention.op import latent_attention

# (problem, past): Small and Base at one token, minis, groups of heads, prefill and chunks, caches of odd lengths.
LATENT = {
    "small, decode": (LatentProblem(1, 16, 1, 512, 64, 300, 0.07), 140),
    "base, decode": (LatentProblem(1, 32, 1, 512, 64, 96, 0.07), 17),
    "small, first chunk": (LatentProblem(1, 16, 3, 512, 64, 40, 0.07), 0),
    "small-mini, decode": (LatentProblem(2, 4, 1, 48, 16, 200, 0.2), 150),
    "small-mini, later chunk": (LatentProblem(1, 4, 21, 48, 16, 70, 0.2), 33),
    "base-mini, empty cache": (LatentProblem(2, 8, 1, 32, 8, 65, 0.2), 0),
    "base-mini, full cache": (LatentProblem(1, 8, 37, 32, 8, 150, 0.2), 113),
}
HEADS = {
    "tiny, decode": (AttentionProblem(1, 10, 10, 1, 128, 200, 0.09), 160),
    "tiny, chunk": (AttentionProblem(1, 10, 10, 9, 128, 40, 0.09), 20),
    "nano, chunk": (AttentionProblem(1, 4, 4, 40, 32, 90, 0.18), 50),
    "tiny-mini, decode": (AttentionProblem(2, 6, 6, 1, 16, 130, 0.25), 70),
    "groups of three": (AttentionProblem(2, 6, 2, 7, 64, 90, 0.12), 5),
    "largest heads": (AttentionProblem(1, 2, 1, 1, 256, 80, 0.06), 64),
}


def tables(rng: np.random.Generator, batch: int, tokens: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [B, T, size] of random angles, each angle twice."""
    angles = np.tile(rng.random((batch, tokens, size // 2), np.float32) * 6, 2)
    return np.cos(angles), np.sin(angles)


def widened(arrays: dict[str, np.ndarray], names: tuple[str, ...]) -> list[torch.Tensor]:
    return [torch.from_numpy(arrays[name].astype(np.float32)) for name in names]


def latent_error(emulator, problem: LatentProblem, past: int, order: int = 0) -> tuple[float, float]:
    """Largest differences of y and of the cache."""
    p, rng = problem, np.random.default_rng(past)
    arrays = {
        "query": half(rng, (p.batch, p.heads, p.tokens, p.rank)), "latent": half(rng, (p.batch, p.tokens, p.rank)),
        "query_rope": half(rng, (p.batch, p.tokens, p.heads, p.rope_dim)),
        "key_rope": half(rng, (p.batch, p.tokens, p.rope_dim)),
        "cache": half(rng, (p.batch, p.capacity, p.rank + p.rope_dim)), "past_length": np.array([past]),
        "y": np.full((p.batch, p.heads, p.tokens, p.rank), np.nan, np.float16),
    }  # fmt: skip
    # What lies behind the conversation is anything.
    arrays["cache"][:, past:] = np.nan
    arrays["cos"], arrays["sin"] = tables(rng, p.batch, p.tokens, p.rope_dim)
    names = ("query", "query_rope", "latent", "key_rope", "cos", "sin", "cache")
    tensors = widened(arrays, names)
    want = latent_attention(*tensors, torch.tensor(past), None, None, p.scale)
    emulator.run(latent_plan(problem), arrays, order)
    rows = slice(past + p.tokens)
    return max_difference(arrays["y"], want), max_difference(arrays["cache"][:, rows], tensors[-1][:, rows])


def heads_error(emulator, problem: AttentionProblem, past: int, order: int = 0) -> tuple[float, float]:
    """Largest differences of y and of the caches."""
    p, rng = problem, np.random.default_rng(past)
    arrays = {"query": half(rng, (p.batch, p.tokens, p.heads * p.head_dim)), "past_length": np.array([past])}
    arrays |= {name: half(rng, (p.batch, p.tokens, p.kv_heads * p.head_dim)) for name in ("key", "value")}
    arrays["cos"], arrays["sin"] = tables(rng, p.batch, p.tokens, p.head_dim)
    for name in ("key_cache", "value_cache"):
        arrays[name] = half(rng, (p.batch, p.capacity, p.kv_heads, p.head_dim))
        arrays[name][:, past:] = np.nan
    tensors = widened(arrays, ("query", "key", "value", "cos", "sin", "key_cache", "value_cache"))
    want = attention(*tensors, torch.tensor(past), None, None, None, p.scale)
    arrays["y"] = np.full(want.shape, np.nan, np.float16)
    emulator.run(attention_plan(problem), arrays, order)
    rows = slice(past + p.tokens)
    caches = (max_difference(arrays[name][:, rows], tensor[:, rows]) for name, tensor in
              zip(("key_cache", "value_cache"), tensors[-2:], strict=True))  # fmt: skip
    return max_difference(arrays["y"], want), max(caches)


@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_equals_the_eager_operator(emulator, name: str) -> None:
    y, cache = latent_error(emulator, *LATENT[name], order=len(name) % 8)
    assert y < CUDA_ATTENTION and cache < CUDA_ATTENTION


@pytest.mark.parametrize("name", HEADS)
def test_attention_equals_the_eager_operator(emulator, name: str) -> None:
    y, caches = heads_error(emulator, *HEADS[name], order=len(name) % 8)
    assert y < CUDA_ATTENTION and caches < CUDA_ATTENTION


@pytest.mark.parametrize("past", [-(2**40), -3000, -2, 39, 2**31 + 5, 2**40])
@pytest.mark.parametrize("name", ["latent", "heads"])
def test_a_past_length_that_cannot_be_touches_no_other_memory(emulator, name: str, past: int) -> None:
    """Whoever runs an engine sees to it that it is right; a wrong one must not damage what else the device holds."""
    rng, tokens, capacity = np.random.default_rng(0), 3, 40
    latent, heads = LatentProblem(2, 4, tokens, 48, 16, capacity, 0.2), AttentionProblem(2, 4, 4, tokens, 16, 40, 0.2)
    shapes = {"query": (2, tokens, 64), "key": (2, tokens, 64), "value": (2, tokens, 64), "y": (2, tokens, 64),
              "key_cache": (2, capacity, 4, 16), "value_cache": (2, capacity, 4, 16)}  # fmt: skip
    if name == "latent":
        shapes = {"query": (2, 4, tokens, 48), "query_rope": (2, tokens, 4, 16), "latent": (2, tokens, 48),
                  "key_rope": (2, tokens, 16), "cache": (2, capacity, 64), "y": (2, 4, tokens, 48)}  # fmt: skip
    arrays = {key: half(rng, shape) for key, shape in shapes.items()} | {"past_length": np.array([past])}
    arrays["cos"], arrays["sin"] = tables(rng, 2, tokens, 16)
    before = {key: array.copy() for key, array in arrays.items() if "cache" in key}
    emulator.run(latent_plan(latent) if name == "latent" else attention_plan(heads), arrays)
    written = [token for token in range(tokens) if 0 <= past + token < capacity]
    for key, array in before.items():
        changed = np.flatnonzero((arrays[key] != array).any(axis=(0, *range(2, array.ndim))))
        np.testing.assert_array_equal(changed, [past + token for token in written])


def test_decode_splits_the_cache_and_a_long_prefill_does_not() -> None:
    assert latent_plan(LatentProblem(1, 16, 1, 512, 64, 4096, 1.0)).launches[1].grid == (64, 1, 1)
    assert latent_plan(LatentProblem(1, 16, 512, 512, 64, 4096, 1.0)).launches[1].grid == (1, 256, 1)


def test_a_latent_block_fits_into_every_gpus_shared_memory() -> None:
    assert LatentProblem(1, 32, 1, 512, 64, 4096, 1.0).sizes.shared_bytes <= 99 << 10


def test_heads_that_no_kernel_covers_are_refused_with_their_size() -> None:
    with pytest.raises(VL2Error, match="heads of 72"):
        AttentionProblem(1, 4, 4, 1, 72, 16, 1.0)
    with pytest.raises(VL2Error, match="latents of 640"):
        LatentProblem(1, 4, 1, 640, 64, 16, 1.0)
    with pytest.raises(VL2Error, match="9 tokens in a cache of 8"):
        LatentProblem(1, 4, 9, 512, 64, 8, 1.0)

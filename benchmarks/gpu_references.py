"""Float64 results of the CUDA kernels in NumPy, and random inputs for them; nothing here is shared with the kernels."""

from __future__ import annotations

import numpy as np

from vl2.plugins.cuda.attention import AttentionProblem
from vl2.plugins.cuda.experts import ExpertsProblem
from vl2.plugins.cuda.latent import LatentProblem
from vl2.plugins.cuda.linear import LinearProblem
from vl2.plugins.cuda.routing import RoutingProblem
from vl2.plugins.cuda.storage import Storage


def half(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Unit normal float16."""
    return rng.standard_normal(shape, np.float32).astype(np.float16)


def random_weight(
    rng: np.random.Generator, shape: tuple[int, ...], storage: Storage, name: str
) -> dict[str, np.ndarray]:
    """Buffers of a weight [.., N, K]; a row times unit activations is about 1."""
    columns = shape[-1]
    if storage.scheme == "fp16":
        return {name: half(rng, shape) * np.float16(columns**-0.5)}
    low, group = (-8 if storage.scheme == "int4" else -128), storage.group_size
    codes = rng.integers(low, -low, shape, np.int8)
    scales = (rng.random((*shape[:-1], columns // group), np.float32) + 0.5) * columns**-0.5 / -low * 1.7
    if storage.scheme == "int4":
        unsigned = (codes + 8).astype(np.uint8)
        codes = unsigned[..., 0::2] | unsigned[..., 1::2] << 4
    return {name: np.ascontiguousarray(codes), f"{name}_scale": scales.astype(np.float16)}


def dequantized(arrays: dict[str, np.ndarray], name: str, storage: Storage, expert: int | None = None) -> np.ndarray:
    """float64 [N, K] of a weight, or of one expert of a stack."""
    codes, scales = (None if key not in arrays else arrays[key] if expert is None else arrays[key][expert]
                     for key in (name, f"{name}_scale"))  # fmt: skip
    if storage.scheme == "int4":
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(len(codes), -1).astype(np.int8) - 8
    values = codes.astype(np.float64)
    if scales is None:
        return values
    return values * np.repeat(scales.astype(np.float64), values.shape[1] // scales.shape[1], 1)


def route(logits: np.ndarray, bias: np.ndarray, problem: RoutingProblem) -> tuple[np.ndarray, np.ndarray]:
    """Chosen experts in order of their selection value, and weights (specification 9)."""
    scores = logits.astype(np.float64)
    scores = 1 / (1 + np.exp(-scores)) if problem.scoring_func == "sigmoid" else np.exp(scores)
    if problem.scoring_func == "softmax":
        scores /= scores.sum(1, keepdims=True)
    biased = problem.topk_method == "noaux_tc"
    choice = scores + bias if biased else scores.copy()
    if problem.limited:
        groups = choice.reshape(len(choice), problem.n_group, -1)
        value = np.sort(groups, 2)[..., -2:].sum(2) if biased else groups.max(2)
        dropped = np.argsort(-value, 1)[:, problem.topk_group :]
        np.put_along_axis(groups, dropped[..., None], 0.0, 1)
    chosen = np.argsort(-choice, 1, kind="stable")[:, : problem.top_k]
    weights = np.take_along_axis(scores if biased else choice, chosen, 1)
    if problem.norm_topk_prob and problem.top_k > 1:
        weights = weights / (weights.sum(1, keepdims=True) + 1e-20)
    return chosen, weights * problem.routed_scaling_factor


def experts(arrays: dict[str, np.ndarray], problem: ExpertsProblem) -> tuple[np.ndarray, int]:
    """y [N, H] and how many experts were chosen at all."""
    chosen, weights = route(arrays["logits"], arrays["correction_bias"], problem.routing)
    x = arrays["x"].astype(np.float64)
    y = np.zeros(x.shape)
    for e in np.unique(chosen):
        token, choice = np.nonzero(chosen == e)
        gate, up = (dequantized(arrays, name, problem.gate_up, e) for name in ("gate", "up"))
        down = dequantized(arrays, "down", problem.down, e)
        np.add.at(y, token, (_gated(x[token], gate, up) @ down.T) * weights[token, choice, None])
    if problem.shared_size:
        gate, up = (dequantized(arrays, name, problem.shared_gate_up) for name in ("shared_gate", "shared_up"))
        y += _gated(x, gate, up) @ dequantized(arrays, "shared_down", problem.shared_down).T
    return y, len(np.unique(chosen))


def _gated(x: np.ndarray, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    g = x @ gate.T
    return g / (1 + np.exp(-g)) * (x @ up.T)


def linear(arrays: dict[str, np.ndarray], problem: LinearProblem) -> np.ndarray:
    """x Wᵀ."""
    return arrays["x"].astype(np.float64) @ dequantized(arrays, "weight", problem.storage).T


def rope_tables(rng: np.random.Generator, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """cos and sin [B, T, size] of random angles, each angle twice."""
    angles = np.tile(rng.random((*shape[:2], shape[2] // 2), np.float32) * 6, 2)
    return {"cos": np.cos(angles), "sin": np.sin(angles)}


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """[B, T, heads, size], pairs (i, i + size / 2)."""
    low, high = np.split(x.astype(np.float64), 2, -1)
    return x * cos[:, :, None].astype(np.float64) + np.concatenate((-high, low), -1) * sin[:, :, None]


def _attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, past: int, scale: float) -> np.ndarray:
    """q [.., T, d], keys [.., S, d], values [.., S, v]: causal, S = past + T."""
    scores = q @ np.swapaxes(keys, -1, -2) * scale
    later = np.arange(keys.shape[-2]) > past + np.arange(q.shape[-2])[:, None]
    weights = np.exp(np.where(later, -np.inf, scores - scores.max(-1, keepdims=True)))
    return weights / weights.sum(-1, keepdims=True) @ values


def latent(arrays: dict[str, np.ndarray], p: LatentProblem, past: int) -> dict[str, np.ndarray]:
    """y [B, heads, T, R]; rows of the cache are put in after rounding, as the kernel stores them."""
    def turned(x: np.ndarray) -> np.ndarray:
        return rotated(np.concatenate((x[..., 0::2], x[..., 1::2]), -1), arrays["cos"], arrays["sin"])

    seen, new = past + p.tokens, slice(past, past + p.tokens)
    cache = arrays["cache"].astype(np.float64)
    key = turned(arrays["key_rope"][:, :, None])[:, :, 0].astype(np.float16)
    cache[:, new] = np.concatenate((arrays["latent"], key), -1)
    q = np.concatenate((arrays["query"], turned(arrays["query_rope"]).swapaxes(1, 2)), -1)
    return {"y": _attend(q, cache[:, None, :seen], cache[:, None, :seen, : p.rank], past, p.scale)}


def heads(arrays: dict[str, np.ndarray], p: AttentionProblem, past: int) -> dict[str, np.ndarray]:
    """y [B, T, heads · D]."""
    seen, new, group = past + p.tokens, slice(past, past + p.tokens), p.heads // p.kv_heads
    shape = (p.batch, p.tokens, -1, p.head_dim)
    q, k = (rotated(arrays[name].reshape(shape), arrays["cos"], arrays["sin"]) for name in ("query", "key"))
    held = []
    for name, rows in (("key_cache", k.astype(np.float16)), ("value_cache", arrays["value"].reshape(shape))):
        cache = arrays[name].astype(np.float64)
        cache[:, new] = rows
        held.append(np.repeat(cache[:, :seen], group, 2).swapaxes(1, 2))
    y = _attend(q.swapaxes(1, 2), held[0], held[1], past, p.scale)
    return {"y": y.swapaxes(1, 2).reshape(p.batch, p.tokens, -1)}

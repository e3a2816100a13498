"""Random weights as the kernels store them, beside the numbers they stand for."""

from __future__ import annotations

import numpy as np

from vl2.plugins.cuda.storage import Storage


def random_weight(rng: np.random.Generator, shape: tuple[int, ...], storage: Storage, name: str):
    """Buffers of a weight [.., N, K] by name, and its values in float64; a row times unit activations is about 1."""
    columns = shape[-1]
    if storage.scheme == "fp16":
        values = (rng.standard_normal(shape, np.float32) * columns**-0.5).astype(np.float16)
        return {name: values}, values.astype(np.float64)
    low = -8 if storage.scheme == "int4" else -128
    codes = rng.integers(low, -low, shape, np.int8)
    group = storage.group_size or columns
    scales = (rng.random((*shape[:-1], columns // group), np.float32) + 0.5) * columns**-0.5 / -low * 1.7
    scales = scales.astype(np.float16)
    values = codes * np.repeat(scales.astype(np.float64), group, axis=-1)
    if storage.scheme == "int4":
        unsigned = (codes + 8).astype(np.uint8)
        codes = unsigned[..., 0::2] | unsigned[..., 1::2] << 4
    return {name: np.ascontiguousarray(codes), f"{name}_scale": scales}, values


def half(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Unit normal float16."""
    return rng.standard_normal(shape, np.float32).astype(np.float16)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """max |Δ| beyond float16's rounding of the result, over the RMS of what is wanted; infinite where not finite."""
    excess = np.maximum(np.abs(got.astype(np.float64) - want) - np.abs(want) * 2.0**-11, 0)
    return float(excess.max() / np.sqrt((want**2).mean())) if np.isfinite(got).all() else float("inf")

"""The cache buffers of both attention operators in plain steps: float32, float16, or INT8 with a scale a row."""

from __future__ import annotations

import torch
from torch import Tensor

from vl2.errors import VL2Error

CACHE_DTYPES = (torch.float32, torch.float16, torch.int8)
_LARGEST_CODE = 127


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes [..., D] and float32 scales [...] of rows x [..., D]: code = round(x / scale), scale = max |x| / 127.

    A row with NaN or infinity becomes NaN as a whole; one whose scale would be subnormal becomes zero.
    """
    scale = x.float().abs().amax(dim=-1) / _LARGEST_CODE
    finite = scale.isfinite()
    usable = finite & (scale >= torch.finfo(torch.float32).tiny)
    codes = torch.where(usable[..., None], x / scale[..., None], 0.0).round().to(torch.int8)
    scale = torch.where(usable, scale, 0.0)
    return codes, torch.where(finite, scale, torch.nan)


def write_rows(cache: Tensor, scale: Tensor | None, start: int, rows: Tensor) -> None:
    """Puts rows [T, ..., D] into cache [C, ..., D] from `start` on; scale: [C, ...] for INT8, else None."""
    end = start + len(rows)
    if scale is None:
        cache[start:end] = rows.to(cache.dtype)
    else:
        cache[start:end], scale[start:end] = quantize_rows(rows)


def read_rows(cache: Tensor, scale: Tensor | None, end: int) -> Tensor:
    """The first `end` rows of a cache in float32."""
    rows = cache[:end].float()
    return rows if scale is None else rows * scale[:end, ..., None]


def starts_of(past_length: Tensor, batch: int, tokens: int, capacity: int) -> list[int]:
    """Where each row of the batch writes. Raises VL2Error where the new tokens do not fit."""
    starts = past_length.expand(batch).tolist()
    for start in starts:
        if not 0 <= start <= capacity - tokens:
            raise VL2Error(f"past_length is {start} with {tokens} new tokens, the cache has room for {capacity}",
                           "give a larger buffer")
    return starts


def slots_of(cache_row: Tensor | None, batch: int, slots: int) -> list[int]:
    """The row of the caches of each row of the batch: 0 … batch − 1 unless told. Raises VL2Error where one is not there
    or is given twice."""
    rows = list(range(batch)) if cache_row is None else cache_row.tolist()
    for row in rows:
        if not 0 <= row < slots:
            raise VL2Error(f"cache_row is {row}, the cache has {slots} rows", "give a row that is there")
    if len(set(rows)) < len(rows):
        raise VL2Error(f"cache_row is {rows}, which has a row twice", "give each sequence a row of its own")
    return rows


def causal_softmax(scores: Tensor) -> Tensor:
    """Weights of scores [heads, T, P + T]: query t sees the keys up to P + t; softmax in float32."""
    tokens, total = scores.shape[1:]
    hidden = torch.ones(tokens, total, dtype=torch.bool, device=scores.device).triu(total - tokens + 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1, dtype=torch.float32)

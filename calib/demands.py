"""What streaming asks of a machine: memory at its peak, and work in floating-point operations, step by step.

Estimates, rather too high: of the work only the proportions are used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from vl2.calib.statistics import ROWS_AT_ONCE
from vl2.config import LanguageConfig, VisionConfig
from vl2.errors import VL2Error

PROCESS_BYTES = 450 << 20  # Python with torch: 230 MB after the imports; the rest for thread pools and the allocator
_FLOAT = 4


def check_memory(config: LanguageConfig, lengths: Sequence[int], limit_bytes: int | None) -> None:
    """Raises VL2Error when streaming needs more than the limit, saying how much and what would fit.

    lengths: tokens of each sequence.
    """
    tokens, longest = sum(lengths), max(lengths)
    needed = peak_bytes(config, tokens, longest)
    if limit_bytes is None or needed <= limit_bytes:
        return
    fixed = peak_bytes(config, 0, longest)
    fitting = int((limit_bytes - fixed) / ((needed - fixed) / tokens))
    raise VL2Error(
        f"{tokens} calibration tokens need about {_gigabytes(needed)} of memory, more than the limit of "
        f"{_gigabytes(limit_bytes)}",
        f"about {fitting} tokens would fit" if fitting > longest else
        f"no calibration fits below {_gigabytes(peak_bytes(config, longest, longest))}: raise the limit, or leave out "
        "the longest conversations",
    )


def peak_bytes(config: LanguageConfig, tokens: int, longest: int) -> int:
    """Resident memory of `stream_layers` at its peak, without what `quantize_layer` holds.

    tokens: of the calibration set; longest: of its longest sequence.
    """
    size, stages = config.hidden_size, [_attention_bytes(config, longest)]
    for l in range(config.num_hidden_layers):
        stages.append(_routed_bytes(config, tokens) if config.is_moe(l) else _dense_bytes(config))
    return PROCESS_BYTES + tokens * size * _FLOAT + max(stages)


def disk_bytes(config: LanguageConfig, tokens: int) -> int:
    """What a calibration set and `stream_layers` write at most: embeddings twice while they are joined, hidden states
    twice while a layer is finished, and the statistics of one stage."""
    size, sites = config.hidden_size, []
    for l in range(config.num_hidden_layers):
        if config.is_moe(l):
            inner, shared = config.moe_intermediate_size, (config.n_shared_experts or 0) * config.moe_intermediate_size
            sites.append(config.n_routed_experts * (size**2 + 2 * inner**2) + size**2 + shared**2)
        else:
            sites.append(size**2 + config.intermediate_size**2)
    return (4 * tokens * size + max(sites)) * _FLOAT


def _attention_bytes(config: LanguageConfig, longest: int) -> int:
    matrices = _attention_matrices(config)
    weights = sum(rows * columns for rows, columns in matrices) * _FLOAT
    sites = sum(columns**2 for columns in {columns for _, columns in matrices}) * _FLOAT
    activations = longest * (4 * config.hidden_size + 2 * sum(rows for rows, _ in matrices)) * _FLOAT
    return weights + sites + activations + 3 * longest**2 * _FLOAT  # the mask, as booleans, floats and a copy


def _dense_bytes(config: LanguageConfig) -> int:
    size, inner = config.hidden_size, config.intermediate_size
    return 3 * size * inner * _FLOAT + (size**2 + inner**2) * _FLOAT + _rows_bytes(size, inner)


def _routed_bytes(config: LanguageConfig, tokens: int) -> int:
    size, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    shared = (config.n_shared_experts or 0) * inner
    weights = (3 * size * (shared + 2 * inner) + experts * size) * _FLOAT
    sums = (2 * size**2 + shared**2 + 2 * inner**2) * _FLOAT
    routes = tokens * (2 * experts * _FLOAT + config.num_experts_per_tok * 20)
    return tokens * size * _FLOAT + weights + sums + routes + _rows_bytes(size, max(shared, inner))


def _rows_bytes(size: int, inner: int) -> int:
    return ROWS_AT_ONCE * (4 * size + 4 * inner) * _FLOAT


def _attention_matrices(config: LanguageConfig) -> list[tuple[int, int]]:
    """Rows and columns of the attention's matrices."""
    size, heads = config.hidden_size, config.num_attention_heads
    if not config.use_mla:
        kv = config.kv_heads * config.head_dim
        return [(size, size), (kv, size), (kv, size), (size, size)]
    rank, query = config.kv_lora_rank, heads * config.head_dim
    queries = [(query, size)]
    if config.q_lora_rank is not None:
        queries = [(config.q_lora_rank, size), (query, config.q_lora_rank)]
    return [*queries, (rank + config.qk_rope_head_dim, size),
            (heads * (config.qk_nope_head_dim + config.v_head_dim), rank), (size, heads * config.v_head_dim)]


def layer_work(config: LanguageConfig, l: int, tokens: int) -> dict[str, float]:
    """Operations of each step of a layer: what is multiplied, and the products of the Hessians."""
    matrices = _attention_matrices(config)
    attention = 2.0 * tokens * sum(rows * columns for rows, columns in matrices)
    hessians = 2.0 * tokens * sum(columns**2 for columns in {columns for _, columns in matrices})
    steps = {"attention statistics": attention + hessians, "attention output": attention}
    size = config.hidden_size
    if not config.is_moe(l):
        inner = config.intermediate_size
        dense = 6.0 * tokens * size * inner
        return steps | {"dense statistics": dense + 2.0 * tokens * (size**2 + inner**2), "dense output": dense}
    inner, routed = config.moe_intermediate_size, tokens * config.num_experts_per_tok
    shared = (config.n_shared_experts or 0) * inner
    output = 6.0 * size * (routed * inner + tokens * shared)
    products = 2.0 * (routed * (size**2 + inner**2) + tokens * (size**2 + shared**2))
    return steps | {"expert statistics": output + products, "expert output": output}


def tile_work(config: VisionConfig) -> float:
    """Operations of one tile through the tower."""
    patches, width = (config.image_size // config.patch_size) ** 2, config.width
    return config.layers * (2.0 * patches * (4 * width**2 + 2 * width * config.mlp_hidden) + 4.0 * patches**2 * width)


def matrix_rate() -> float:
    """Operations a second of float32 matrix products on this machine: the fastest of those that a tenth of a second has
    room for, as others run on it too."""
    a, fastest, end = torch.ones(768, 768), math.inf, time.monotonic() + 0.1
    while time.monotonic() < end or math.isinf(fastest):
        start = time.monotonic()
        a @ a
        fastest = min(fastest, time.monotonic() - start)
    return 2 * 768**3 / fastest


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"

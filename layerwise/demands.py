"""Memory at the peak of a measurement, estimated rather too high."""

from __future__ import annotations

from collections.abc import Sequence

from vl2.calib.demands import PROCESS_BYTES
from vl2.calib.statistics import ROWS_AT_ONCE
from vl2.config import LanguageConfig, ModelConfig, VisionConfig
from vl2.errors import VL2Error
from vl2.layerwise.head import LOGITS_AT_ONCE
from vl2.layerwise.tower import TILES_AT_ONCE

_FLOAT = 4
_COPIES = 4  # of a part's weights: both models', their difference, one without the scales of folds


def check_memory(config: ModelConfig, lengths: Sequence[int], limit_bytes: int | None) -> None:
    """Raises VL2Error when more than the limit is needed. lengths: positions of each conversation."""
    needed = peak_bytes(config, sum(lengths), max(lengths))
    if limit_bytes is not None and needed > limit_bytes:
        raise VL2Error(f"{sum(lengths)} positions need about {needed / 1e9:.1f} GB of memory, more than the limit of "
                       f"{limit_bytes / 1e9:.1f} GB", "take fewer (--tokens), or raise --max-ram")


def peak_bytes(config: ModelConfig, positions: int, longest: int) -> int:
    """Resident memory; positions: of all conversations; longest: of one."""
    language = config.language_config
    states = positions * language.hidden_size * _FLOAT
    parts = [_attention_bytes(language, longest) + 4 * states, _routed_bytes(language, positions) + 5 * states,
             _feed_forward_bytes(language, language.intermediate_size) + 4 * states,
             _head_bytes(language) + 4 * states, _tower_bytes(config.vision_config) + 4 * states]
    return PROCESS_BYTES + max(parts)


def _attention_bytes(config: LanguageConfig, longest: int) -> int:
    size = max(config.hidden_size, config.num_attention_heads * config.head_dim)
    return _COPIES * 4 * size * size * _FLOAT + longest * 12 * size * _FLOAT + 3 * longest**2 * _FLOAT


def _feed_forward_bytes(config: LanguageConfig, inner: int) -> int:
    return (_COPIES * 3 * config.hidden_size * inner + ROWS_AT_ONCE * (6 * config.hidden_size + 6 * inner)) * _FLOAT


def _routed_bytes(config: LanguageConfig, positions: int) -> int:
    experts = config.n_routed_experts or 0
    shared = max(config.n_shared_experts or 0, 1) * config.moe_intermediate_size
    routes = 3 * positions * (experts * _FLOAT + (config.num_experts_per_tok or 0) * 12)
    return _feed_forward_bytes(config, shared) + _feed_forward_bytes(config, config.moe_intermediate_size) + routes


def _head_bytes(config: LanguageConfig) -> int:
    # both models' lm_head, and room for what the allocator keeps of the layers: the measured peak lies between 2 and 3
    return 3 * config.vocab_size * config.hidden_size * _FLOAT + 10 * LOGITS_AT_ONCE * 8


def _tower_bytes(config: VisionConfig) -> int:
    tokens = TILES_AT_ONCE * config.grid**2
    return 6 * tokens * config.width * _FLOAT + _COPIES * 12 * config.width**2 * _FLOAT + (100 << 20)

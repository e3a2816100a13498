"""The matrices of a checkpoint that quantization must decide on: every Linear, and the embedding table."""

from __future__ import annotations

import functools
import re

from vl2.config import ModelConfig
from vl2.model.checkpoint import expected_tensors, unused_tensors

WEIGHT = ".weight"
_ROUTER = re.compile(r"language\.model\.layers\.\d+\.mlp\.gate")
_EXPERT = re.compile(r"language\.model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.\w+")
HEAD = "language.lm_head"
EMBEDDINGS = "language.model.embed_tokens"


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Module name (the tensor's without `.weight`) → (N, K), in the model's order, routers and embedding included.

    The vision tower's pooling head is not part of the model and therefore not listed.
    """
    return dict(_matrices(config))


@functools.lru_cache(maxsize=4)
def _matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    unused = unused_tensors(config)
    return {
        name.removesuffix(WEIGHT): shape
        for name, shape in expected_tensors(config).items()
        if name.endswith(WEIGHT) and len(shape) == 2 and name not in unused
    }


def is_router(module: str) -> bool:
    return _ROUTER.fullmatch(module) is not None


def expert_layer(module: str) -> int | None:
    """The decoder layer whose routed experts `module` belongs to, None for any other module."""
    expert = expert_of(module)
    return None if expert is None else expert[0]


def expert_of(module: str) -> tuple[int, int] | None:
    """Decoder layer and number of the routed expert that `module` belongs to, None for any other module."""
    match = _EXPERT.fullmatch(module)
    return (int(match[1]), int(match[2])) if match else None

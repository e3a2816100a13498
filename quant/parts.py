"""A checkpoint in parts: each is quantized, written and resumed whole, as one shard."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LAYER = re.compile(r"language\.model\.layers\.(\d+)\.(input_layernorm|self_attn|post_attention_layernorm|mlp)\.")
_STAGES = {
    "input_layernorm": "attention",
    "self_attn": "attention",
    "post_attention_layernorm": "mlp",
    "mlp": "mlp",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """`stage`: "vision", "embeddings" and "head" once (layer None), "attention" and "mlp" for each decoder layer."""

    stage: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.stage if self.layer is None else f"layer {self.layer} {self.stage}"


def part_of(tensor: str) -> Part:
    """The part that a checkpoint tensor belongs to."""
    match = _LAYER.match(tensor)
    if match:
        return Part(_STAGES[match[2]], int(match[1]))
    if tensor.startswith("language.lm_head."):
        return Part("head")
    return Part("embeddings") if tensor.startswith("language.") else Part("vision")


def split_parts(tensors: Iterable[str]) -> dict[Part, list[str]]:
    """Tensor names by part; vision (with projector and separators) first, then embeddings, the layers, the head."""
    parts: dict[Part, list[str]] = {}
    for tensor in tensors:
        parts.setdefault(part_of(tensor), []).append(tensor)
    return {part: parts[part] for part in sorted(parts, key=_order)}


def _order(part: Part) -> tuple[int, int, int]:
    outer = {"vision": 0, "embeddings": 1, "head": 3}
    return (outer.get(part.stage, 2), part.layer or 0, int(part.stage == "mlp"))

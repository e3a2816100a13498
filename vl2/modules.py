"""Which module a checkpoint tensor belongs to, for sizes by module. A table, first match wins."""

import re

_MODULES: tuple[tuple[str, str], ...] = (
    (r"vision\.attn_pool\.", "vision_pooling_head"),
    (r"vision\.", "vision"),
    (r"projector\.|image_newline$|view_seperator$", "projector"),
    (r"language\.model\.embed_tokens\.", "embed_tokens"),
    (r"language\.lm_head\.", "lm_head"),
    (r"language\.model\.layers\.\d+\.self_attn\.", "attention"),
    (r"language\.model\.layers\.\d+\.mlp\.gate\.", "router"),
    (r"language\.model\.layers\.\d+\.mlp\.experts\.", "experts"),
    (r"language\.model\.layers\.\d+\.mlp\.shared_experts\.", "shared_experts"),
    (r"language\.model\.layers\.\d+\.mlp\.", "dense_mlp"),
    (r"language\.model\.(layers\.\d+\.(input|post_attention)_layernorm|norm)\.", "norms"),
)


def module_of(tensor_name: str) -> str:
    """The module of a checkpoint tensor, such as `experts`; `other` for a name outside the family."""
    return next((module for pattern, module in _MODULES if re.match(pattern, tensor_name)), "other")

"""The graphs of a bundle: the only place that names their inputs, outputs and dynamic sides.

vision:   tiles [tiles, 3, S, S]
       →  image_features [tiles, h², H]
decoder:  inputs_embeds [batch, tokens, H], position_ids [batch, tokens] int64, attention_mask [batch, total] bool,
          past_…
       →  logits [batch, V] of the last position, new_…

`total` is past + tokens. Per layer l the caches are `past_key.l`, `past_value.l` [batch, past, kv_heads, head_dim] or
`past_latent.l` [batch, past, R + dr], and `new_…` with the entries of the new tokens only. Everything else is float32.
"""

from __future__ import annotations

from vl2.config import LanguageConfig, ModelConfig
from vl2.manifest import CachePorts, Graph, Port


def declare_graphs(config: ModelConfig) -> dict[str, Graph]:
    """The graphs of a checkpoint with all their ports, by name, in the order of export."""
    return {"vision": _vision(config), "decoder": _decoder(config)}


def cache_entries(language: LanguageConfig) -> dict[str, tuple[int, ...]]:
    """What a layer keeps of a token: name to shape."""
    if language.use_mla:
        return {"latent": (language.kv_lora_rank + language.qk_rope_head_dim,)}
    return {name: (language.kv_heads, language.head_dim) for name in ("key", "value")}


def _vision(config: ModelConfig) -> Graph:
    side, size = config.tile_size, config.projector_config.n_embed
    tiles = Port("tiles", "float32", ("tiles", 3, side, side))
    features = Port("image_features", "float32", ("tiles", config.tokens_per_side**2, size))
    return Graph("vision.onnx", "vision.data", (tiles,), (features,))


def _decoder(config: ModelConfig) -> Graph:
    language = config.language_config
    inputs = (
        Port("inputs_embeds", "float32", ("batch", "tokens", language.hidden_size)),
        Port("position_ids", "int64", ("batch", "tokens")),
        Port("attention_mask", "bool", ("batch", "total")),
    )
    entries = cache_entries(language)
    caches = [(f"{name}.{l}", entries[name]) for l in range(language.num_hidden_layers) for name in entries]
    past = tuple(Port(f"past_{name}", "float32", ("batch", "past", *entry)) for name, entry in caches)
    new = tuple(Port(f"new_{name}", "float32", ("batch", "tokens", *entry)) for name, entry in caches)
    logits = Port("logits", "float32", ("batch", language.vocab_size))
    ports = tuple(CachePorts(f"past_{name}", f"new_{name}") for name, _ in caches)
    return Graph("decoder.onnx", "decoder.data", (*inputs, *past), (logits, *new), ports)

"""The graphs of a bundle: the only place that names their inputs, outputs and dynamic sides.

vision:   tiles [tiles, 3, S, S]
       →  image_features [tiles, h², H]
decoder:  inputs_embeds [batch, tokens, H], position_ids [batch, tokens] int64, attention_mask [batch, total] bool,
          past_…
       →  logits [batch, V] of the last position, new_…

`total` is past + tokens. Per layer l the caches are `past_key.l`, `past_value.l` [batch, past, kv_heads, head_dim] or
`past_latent.l` [batch, past, R + dr], and `new_…` with the entries of the new tokens only. Everything else is float32.

Where caches are written in place (lowering `cpu`) the decoder takes inputs_embeds, position_ids, `past_length` int64
and whole buffers `key_cache.l`, `value_cache.l` [batch, capacity, kv_heads, head_dim] or `latent_cache.l`
[batch, capacity, R + dr], float32, float16 or int8, and gives logits only. INT8 buffers have float32 scales as well,
`key_scale.l`, `value_scale.l` [batch, capacity, kv_heads] or `latent_scale.l` [batch, capacity, 2] (latent, rope key).

The lowering `cpu` takes `past_length` [batch] and `cache_row` [batch] int64: which of the rows of its buffers
[slots, capacity, …] holds each sequence (`with_slots`).
"""

from __future__ import annotations

from dataclasses import replace

from vl2.config import LanguageConfig, ModelConfig
from vl2.manifest import CACHE_ROW, CachePorts, Graph, Port

# Caches that the decoder writes in place: name to element type.
KV_CACHES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}


def declare_graphs(config: ModelConfig, kv_cache: str | None = None) -> dict[str, Graph]:
    """The graphs of a checkpoint with all their ports, by name, in the order of export.

    kv_cache: element type where caches are buffers that the decoder writes into, None where it gives new entries.
    """
    decoder = _decoder(config) if kv_cache is None else _decoder_in_place(config, kv_cache)
    return {"vision": _vision(config), "decoder": decoder}


def cache_entries(language: LanguageConfig) -> dict[str, tuple[int, ...]]:
    """What a layer keeps of a token: name to shape."""
    if language.use_mla:
        return {"latent": (language.kv_lora_rank + language.qk_rope_head_dim,)}
    return {name: (language.kv_heads, language.head_dim) for name in ("key", "value")}


def cache_scales(language: LanguageConfig, kv_cache: str) -> dict[str, tuple[int, ...]]:
    """The scales that a layer keeps of a token beside INT8 entries: name to shape."""
    if kv_cache != "int8":
        return {}
    return {"latent": (2,)} if language.use_mla else {name: (language.kv_heads,) for name in ("key", "value")}


def _vision(config: ModelConfig) -> Graph:
    side, size = config.tile_size, config.projector_config.n_embed
    tiles = Port("tiles", "float32", ("tiles", 3, side, side))
    features = Port("image_features", "float32", ("tiles", config.tokens_per_side**2, size))
    return Graph("vision.onnx", "vision.data", (tiles,), (features,))


def _decoder(config: ModelConfig) -> Graph:
    language = config.language_config
    inputs = (*_tokens(language), Port("attention_mask", "bool", ("batch", "total")))
    past, new = (
        tuple(Port(f"{way}_{name}.{l}", "float32", ("batch", side, *entry)) for l, name, entry in _entries(language))
        for way, side in (("past", "past"), ("new", "tokens"))
    )
    pairs = tuple(CachePorts(taken.name, given.name) for taken, given in zip(past, new, strict=True))
    return Graph("decoder.onnx", "decoder.data", (*inputs, *past), (_logits(language), *new), pairs)


def _decoder_in_place(config: ModelConfig, kv_cache: str) -> Graph:
    language = config.language_config
    inputs = (*_tokens(language), Port("past_length", "int64", ()))
    entries = {f"{name}_cache": (kv_cache, shape) for name, shape in cache_entries(language).items()}
    entries |= {f"{name}_scale": ("float32", shape) for name, shape in cache_scales(language, kv_cache).items()}
    buffers = tuple(Port(f"{name}.{l}", dtype, ("batch", "capacity", *shape))
                    for l in range(language.num_hidden_layers) for name, (dtype, shape) in entries.items())
    caches = tuple(CachePorts(buffer.name, None) for buffer in buffers)
    return Graph("decoder.onnx", "decoder.data", (*inputs, *buffers), (_logits(language),), caches)


def with_slots(graphs: dict[str, Graph]) -> dict[str, Graph]:
    """The declared graphs with caches written in place as the `cpu` lowering has them: sequences of unequal length,
    each in any row of the buffers."""
    decoder, inputs = graphs["decoder"], []
    caches = {ports.past for ports in decoder.cache}
    for port in decoder.inputs:
        if port.name == "past_length":
            inputs += [replace(port, shape=("batch",)), Port(CACHE_ROW, "int64", ("batch",))]
        else:
            inputs.append(replace(port, shape=("slots", *port.shape[1:])) if port.name in caches else port)
    return {**graphs, "decoder": replace(decoder, inputs=tuple(inputs))}


def _tokens(language: LanguageConfig) -> tuple[Port, Port]:
    return (
        Port("inputs_embeds", "float32", ("batch", "tokens", language.hidden_size)),
        Port("position_ids", "int64", ("batch", "tokens")),
    )


def _logits(language: LanguageConfig) -> Port:
    return Port("logits", "float32", ("batch", language.vocab_size))


def _entries(language: LanguageConfig) -> list[tuple[int, str, tuple[int, ...]]]:
    """Layer, name and shape of everything that is cached, in the order of the ports."""
    entries = cache_entries(language)
    return [(l, name, entries[name]) for l in range(language.num_hidden_layers) for name in entries]

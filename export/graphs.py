"""The graphs of a bundle: the only place that names their inputs, outputs and dynamic sides.

| graph | inputs | outputs |
|---|---|---|
| vision | tiles [tiles, 3, S, S] | image_features [tiles, h², H] |
| decoder | inputs_embeds [batch, tokens, H], position_ids [batch, tokens] int64, attention_mask [batch, total] bool, past_… | logits [batch, V] of the last position, new_… |

`total` is past + tokens. Per layer l the caches are `past_key.l`, `past_value.l` [batch, past, kv_heads, head_dim] or
`past_latent.l` [batch, past, R + dr], and `new_…` with the entries of the new tokens only. Everything else is float32.
"""

from __future__ import annotations

from torch import Tensor, nn

from vl2.config import ModelConfig
from vl2.manifest import CachePorts, Graph, Port
from vl2.model.vl2 import DeepseekVL2


class VisionGraph(nn.Module):
    """Tower and projector."""

    def __init__(self, model: DeepseekVL2):
        super().__init__()
        self.vision, self.projector = model.vision, model.projector

    def forward(self, tiles: Tensor) -> Tensor:
        return self.projector(self.vision(tiles))


class DecoderGraph(nn.Module):
    """Prefill and decode in one; logits of the last position only."""

    def __init__(self, model: DeepseekVL2):
        super().__init__()
        self.language = model.language

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, attention_mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        hidden, new = self.language(inputs_embeds, position_ids, attention_mask, past)
        return self.language.logits(hidden[:, -1]), *new


# In the order in which they are exported: what fails soon comes first.
MODULES: dict[str, type[VisionGraph] | type[DecoderGraph]] = {"vision": VisionGraph, "decoder": DecoderGraph}


def declare_graphs(config: ModelConfig) -> dict[str, Graph]:
    """The graphs of a checkpoint with all their ports, by name."""
    return {"vision": _vision(config), "decoder": _decoder(config)}


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
    entry: tuple[int, ...]
    if language.use_mla:
        names, entry = ("latent",), (language.kv_lora_rank + language.qk_rope_head_dim,)
    else:
        names, entry = ("key", "value"), (language.kv_heads, language.head_dim)
    caches = [f"{name}.{l}" for l in range(language.num_hidden_layers) for name in names]
    past = tuple(Port(f"past_{name}", "float32", ("batch", "past", *entry)) for name in caches)
    new = tuple(Port(f"new_{name}", "float32", ("batch", "tokens", *entry)) for name in caches)
    logits = Port("logits", "float32", ("batch", language.vocab_size))
    ports = tuple(CachePorts(f"past_{name}", f"new_{name}") for name in caches)
    return Graph("decoder.onnx", "decoder.data", (*inputs, *past), (logits, *new), ports)

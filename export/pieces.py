"""The model cut into pieces, so that each kind of piece is traced once however many layers a model has.

A graph is a chain of pieces that pass named values on. Tracing costs seconds a layer; a copy costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from vl2.config import LanguageConfig
from vl2.export.graphs import cache_entries, cache_scales, declare_graphs
from vl2.manifest import Graph, Port
from vl2.model.decoder import Decoder, DecoderLayer, additive_mask
from vl2.model.moe import MoE
from vl2.model.projector import Projector
from vl2.model.rope import rope_tables
from vl2.model.vision import VisionTower
from vl2.model.vl2 import DeepseekVL2


@dataclass(frozen=True)
class Piece:
    """A module on the meta device, what it takes and gives. Pieces of one kind differ in parameters and names only."""

    kind: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class VisionStem(nn.Module):
    """Patches and positions."""

    def __init__(self, tower: VisionTower):
        super().__init__()
        self.patch_embed, self.pos_embed = tower.patch_embed, tower.pos_embed

    def forward(self, tiles: Tensor) -> Tensor:
        return self.patch_embed(tiles) + self.pos_embed


class VisionEnd(nn.Module):
    """The last norm and the projector."""

    def __init__(self, tower: VisionTower, projector: Projector):
        super().__init__()
        self.norm, self.projector = tower.norm, projector

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.norm(x))


class DecoderStem(nn.Module):
    """What all layers share: mask and rotary tables."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.config = decoder.config

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        total, tokens = attention_mask.shape[1], inputs_embeds.shape[1]
        mask = additive_mask(attention_mask, tokens, inputs_embeds.dtype)
        return mask, *rope_tables(self.config, position_ids, total)


class DecoderBlock(nn.Module):
    """A layer with its arguments in a row."""

    def __init__(self, layer: DecoderLayer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        y, new = self.layer(x, mask, (cos, sin), past)
        return y, *new


class InPlaceStem(nn.Module):
    """Rotary tables; rows are causal, so there is no mask."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.config = decoder.config

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        # only dynamic scaling reads the number of keys, and it is not exported
        return rope_tables(self.config, position_ids, total=0)


class InPlaceBlock(nn.Module):
    """A layer that writes its cache; `substitute` gives it the attention that can."""

    def __init__(self, layer: DecoderLayer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past_length: Tensor, *caches: Tensor) -> Tensor:
        entries = len(self.layer.self_attn.cache_names)
        return self.layer(x, None, (cos, sin), (*caches[:entries], past_length, *caches[entries:]))[0]


class DecoderEnd(nn.Module):
    """Final norm and lm_head, of the last position only."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.norm, self.lm_head = decoder.norm, decoder.lm_head

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.norm(x[:, -1]))


def pieces_of(name: str, model: DeepseekVL2, kv_cache: str | None = None) -> list[Piece]:
    """The pieces of a graph of `declare_graphs`, in order. model: on the meta device."""
    if name == "vision":
        return list(_vision(model))
    return list(_decoder(model) if kv_cache is None else _decoder_in_place(model, kv_cache))


def _vision(model: DeepseekVL2) -> Iterator[Piece]:
    vision = model.config.vision_config
    graph = declare_graphs(model.config)["vision"]

    def x(block: int) -> Port:
        return Port(f"x.{block}", "float32", ("tiles", vision.grid**2, vision.width))

    yield Piece("stem", VisionStem(model.vision), graph.inputs, (x(0),))
    for l, block in enumerate(model.vision.blocks):
        yield Piece("block", block, (x(l),), (x(l + 1),))
    yield Piece("end", VisionEnd(model.vision, model.projector), (x(vision.layers),), graph.outputs)


def _decoder(model: DeepseekVL2) -> Iterator[Piece]:
    language = model.config.language_config
    graph = declare_graphs(model.config)["decoder"]
    past, new, width = graph.inputs[3:], graph.outputs[1:], len(cache_entries(language))
    shared = (Port("mask", "float32", ("batch", 1, "tokens", "total")), *_tables(language))
    x = _hidden(graph)
    yield Piece("stem", DecoderStem(model.language), graph.inputs[:3], shared)
    for l, layer in enumerate(model.language.layers):
        caches = slice(l * width, (l + 1) * width)
        yield Piece(_kind(layer), DecoderBlock(layer), (x(l), *shared, *past[caches]), (x(l + 1), *new[caches]))
    yield _end(model, graph)


def _decoder_in_place(model: DeepseekVL2, kv_cache: str) -> Iterator[Piece]:
    language = model.config.language_config
    graph = declare_graphs(model.config, kv_cache)["decoder"]
    _, position_ids, past_length, *buffers = graph.inputs
    x, tables = _hidden(graph), _tables(language)
    yield Piece("stem", InPlaceStem(model.language), (position_ids,), tables)
    width = len(cache_entries(language)) + len(cache_scales(language, kv_cache))
    for l, layer in enumerate(model.language.layers):
        caches = buffers[l * width : (l + 1) * width]
        yield Piece(_kind(layer), InPlaceBlock(layer), (x(l), *tables, past_length, *caches), (x(l + 1),))
    yield _end(model, graph)


def _hidden(graph: Graph) -> Callable[[int], Port]:
    """The port of the states that enter a layer."""
    embeds = graph.inputs[0]
    return lambda layer: embeds if layer == 0 else replace(embeds, name=f"x.{layer}")


def _tables(language: LanguageConfig) -> tuple[Port, ...]:
    size = language.qk_rope_head_dim if language.use_mla else language.head_dim
    return tuple(Port(name, "float32", ("batch", "tokens", size)) for name in ("cos", "sin"))


def _kind(layer: DecoderLayer) -> str:
    return "moe" if isinstance(layer.mlp, MoE) else "dense"


def _end(model: DeepseekVL2, graph: Graph) -> Piece:
    last = _hidden(graph)(model.config.language_config.num_hidden_layers)
    return Piece("end", DecoderEnd(model.language), (last,), graph.outputs[:1])

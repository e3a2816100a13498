"""Tiles through tower and projector, one block's weights in memory, with the statistics of their Linears.

A block is read once for many tiles: reading it takes as long as a few per cent of computing one tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vl2.calib.layer import Replaced
from vl2.calib.statistics import Moments, record_inputs
from vl2.calib.weights import Weights, load_part
from vl2.model.projector import Projector
from vl2.model.vision import PatchEmbed, VisionBlock, VisionTower

_AT_ONCE = 2  # tiles in a forward: 25 MB each in the widest activation of the published tower

# Site → the Linear of a tower block whose input it is.
BLOCK_SITES = {"attention.input": "attn.qkv", "attention.output": "attn.proj", "mlp.input": "mlp.fc1",
               "mlp.down": "mlp.fc2"}
Advance = Callable[[], None]


@torch.inference_mode()
def encode_tiles(
    weights: Weights, tiles: Tensor, moments: dict[str, Moments], advance: Advance, replaced: Replaced | None = None
) -> Tensor:
    """[N, 3, S, S] normalised pixels to [N, h², H] float32, as `DeepseekVL2.encode_tiles`.

    replaced: tensors of blocks and projector that stand for the file's, by the file's names.

    Adds what enters each Linear to `moments`, named `vision_{i}/{site}` and `projector/layers.{i}`; calls `advance`
    after each of `tile_steps` parts.
    """
    config = weights.config.vision_config
    if not len(tiles):
        return tiles.new_zeros(0, weights.config.tokens_per_side**2, weights.config.projector_config.n_embed)
    patch_embed = load_part(weights, lambda: PatchEmbed(config), "vision.patch_embed.")
    x = torch.cat([patch_embed(part) for part in tiles.split(_AT_ONCE)])
    x += weights.parameter("vision.pos_embed")
    for i in range(config.layers):
        block = load_part(weights, lambda: VisionBlock(config), f"vision.blocks.{i}.", replaced)
        linears = {f"vision_{i}/{site}": block.get_submodule(name) for site, name in BLOCK_SITES.items()}
        x = _apply(block, x, linears, moments)
        advance()
    norm = load_part(weights, lambda: VisionTower(config).norm, "vision.norm.")
    projector = load_part(weights, lambda: Projector(weights.config.projector_config), "projector.", replaced)
    linears = {f"projector/layers.{i}": layer for i, layer in enumerate(projector.layers)
               if isinstance(layer, nn.Linear)}
    features = _apply(nn.Sequential(norm, projector), x, linears, moments)
    advance()
    return features


def tile_steps(weights: Weights) -> int:
    """How often `encode_tiles` calls `advance`."""
    return weights.config.vision_config.layers + 1


def _apply(module: nn.Module, x: Tensor, linears: dict[str, nn.Module], moments: dict[str, Moments]) -> Tensor:
    with record_inputs({name: (linear, partial(_add, moments, name)) for name, linear in linears.items()}):
        return torch.cat([module(part) for part in x.split(_AT_ONCE)])


def _add(moments: dict[str, Moments], name: str, x: Tensor) -> None:
    moments.setdefault(name, Moments.empty(x.shape[-1])).add(x.flatten(0, -2))

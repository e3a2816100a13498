"""Tiles through both towers and projectors, one block's weights of each in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from vl2.config import VisionConfig
from vl2.layerwise.checkpoints import Pair
from vl2.layerwise.ledger import Ledger
from vl2.layerwise.parts import States, load_pair, run_part
from vl2.model.projector import Projector
from vl2.model.vision import PatchEmbed, VisionBlock, VisionTower

PROJECTOR = "projector"
TILES_AT_ONCE = 16  # in memory between blocks: 3.4 MB each and model of the published tower
_AT_ONCE = 2  # tiles in a forward: 25 MB each in the widest activation of the published tower


class _Stem(nn.Module):
    """Patches with their positions, named as in `VisionTower`."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, config.width))

    def forward(self, tiles: Tensor) -> Tensor:
        """[N, 3, S, S] to [N, grid², width]."""
        return self.patch_embed(tiles) + self.pos_embed


class _LastNorm(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm = VisionTower(replace(config, layers=1)).norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def tower_steps(config: VisionConfig) -> int:
    """How often `encode_both` calls `advance`."""
    return config.layers + 3


def encode_both(pair: Pair, tiles: Tensor, ledger: Ledger, advance: Callable[[], None]) -> States:
    """float32 [N, 3, S, S] normalised pixels, N at least 1, to both models' [N, h², H]."""
    states = States(tiles, tiles, torch.ones(len(tiles), dtype=torch.uint8))
    for name, prefix, build, adds in _parts(pair):
        parts = load_pair(pair, build, prefix, ledger)
        slices = (slice(start, start + _AT_ONCE) for start in range(0, len(tiles), _AT_ONCE))
        states = run_part(parts, states, slices, (name, adds), ledger)
        advance()
    return states


def _parts(pair: Pair) -> Iterator[tuple[str, str, Callable[[], nn.Module], bool]]:
    """Name, prefix of its parameters, what makes it, and whether it adds to what enters it."""
    vision = pair.config.vision_config
    yield "vision.patches", "vision.", lambda: _Stem(vision), False
    for i in range(vision.layers):
        yield f"vision.blocks.{i}", f"vision.blocks.{i}.", lambda: VisionBlock(vision), True
    yield "vision.norm", "vision.", lambda: _LastNorm(vision), False
    yield PROJECTOR, "projector.", lambda: Projector(pair.config.projector_config), False

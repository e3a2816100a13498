"""From vision features to the decoder's width (specification 6)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vl2.config import ProjectorConfig


def unfold_blocks(features: Tensor, ratio: int) -> Tensor:
    """[N, side², C] to [N, ⌈side/ratio⌉², C·ratio²]: neighbouring tokens side by side, channel-major (c, dy, dx).

    The map is padded with zeros at the bottom and the right up to a multiple of `ratio`.
    """
    side = round(features.shape[1] ** 0.5)
    pad = -side % ratio
    grid = F.pad(features.unflatten(1, (side, side)), (0, 0, 0, pad, 0, pad))
    blocks = grid.unflatten(1, (-1, ratio)).unflatten(3, (-1, ratio))
    return blocks.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)


class Projector(nn.Module):
    """`downsample_mlp_gelu`: blocks of ratio² tokens, then linears with GELU in its erf form between."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.ratio = config.downsample_ratio
        inner = config.n_embed * config.mlp_ratio
        layers: list[nn.Module] = [nn.Linear(config.input_dim * self.ratio**2, inner)]
        for _ in range(config.depth - 2):
            layers += [nn.GELU(), nn.Linear(inner, inner)]
        layers += [nn.GELU(), nn.Linear(inner, config.n_embed)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """features: [N, side², input_dim]. Returns [N, h², n_embed] with h = ⌈side / ratio⌉."""
        return self.layers(unfold_blocks(features, self.ratio))

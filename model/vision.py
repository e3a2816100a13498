"""The SigLIP vision tower (specification 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vl2.config import VisionConfig

_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Patches as one linear map; pixels beyond the last whole patch are not used."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, tiles: Tensor) -> Tensor:
        """[N, 3, S, S] to [N, grid², width], row-major."""
        return self.proj(tiles).flatten(2).transpose(1, 2)


class VisionAttention(nn.Module):
    """Full multi-head attention; the qkv axis is laid out [3, heads, head_dim]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, tokens, width]; same shape out."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linears with GELU in its tanh form."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_hidden)
        self.fc2 = nn.Linear(config.mlp_hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width]; same shape out."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    """x ← x + attn(norm1(x)); x ← x + mlp(norm2(x))."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, _EPS)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.width, _EPS)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, tokens, width]; same shape out."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """Tiles to one feature vector a patch. The file's pooling head (`attn_pool`) has no part in this family."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, config.width))
        nn.init.normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, _EPS)

    def forward(self, tiles: Tensor) -> Tensor:
        """tiles: [N, 3, S, S], normalised pixels. Returns [N, grid², width]."""
        x = self.patch_embed(tiles) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

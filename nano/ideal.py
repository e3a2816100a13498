"""Image tokens as a tower that reads without fault could give them: fixed random vectors of what lies in each token.

A decoder learns on them where to look in a third of a joint step's time and without waiting for the tower, and the
tower learns to give such vectors, so that both fit together when joint training begins.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vl2.nano.batches import Batch
from vl2.nano.labels import BLANK, CLASSES, SLOTS
from vl2.nano.parameters import placed

GLYPH_SIZE, BOX_SIZE = 0.6, 0.5  # standard deviations of the vectors; a decoder's other embeddings have one


@functools.cache
def _vectors(hidden: int) -> tuple[Tensor, Tensor]:
    """float32 [SLOTS · CLASSES, hidden] of a glyph at its place in the token, [hidden, 5] of the first word's box."""
    generator = torch.Generator().manual_seed(0)
    glyphs = torch.randn(SLOTS * CLASSES, hidden, generator=generator, device="cpu") * GLYPH_SIZE
    corners = torch.randn(hidden, 5, generator=generator, device="cpu") * BOX_SIZE
    return glyphs.to(torch.get_default_device()), corners.to(torch.get_default_device())


def ideal_tokens(slots: np.ndarray, boxes: np.ndarray, hidden: int) -> Tensor:
    """float32 [..., hidden] from the labels of tokens: slots uint8 [..., SLOTS], boxes float16 [..., 4], NaN for none.

    A blank token has the vector of a blank first glyph.
    """
    glyphs, corners = _vectors(hidden)
    place = torch.arange(SLOTS)
    classes = placed(slots).long()
    present = (classes != BLANK) | (place == 0)
    box = placed(boxes).float()
    known = ~box[..., :1].isnan()
    told = F.linear(torch.cat([box.nan_to_num(0.0), known.float()], -1), corners)
    return (F.embedding(classes + place * CLASSES, glyphs) * present.unsqueeze(-1)).sum(-2) + told


def ideal_views(batch: Batch, hidden: int) -> tuple[Tensor, Tensor]:
    """(global view [B, h, h, hidden], local tiles [B, th, tw, h, h, hidden]) of a batch, float32.

    Where there are several tiles the global view is blank: it is too coarse to be read.
    """
    wide, high = batch.crop
    local = ideal_tokens(batch.slots, batch.boxes, hidden)
    side = int(local.shape[2] ** 0.5)
    local = local.unflatten(2, (side, side)).unflatten(1, (high, wide))
    if batch.crop == (1, 1):
        return local[:, 0, 0], local
    blank = _vectors(hidden)[0][BLANK]
    return blank.expand(len(local), side, side, hidden), local


def ideal_distance(features: Tensor, batch: Batch) -> Tensor:
    """Mean squared distance of image tokens [..., hidden] of the local tiles, in the labels' order, from ideal ones."""
    ideal = ideal_tokens(batch.slots, batch.boxes, features.shape[-1])
    return F.mse_loss(features.float().flatten(0, -2), ideal.flatten(0, -2))

"""From projected tiles to the vectors of an image, and into the sequence (specification 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vl2.errors import VL2Error


@dataclass(frozen=True)
class ImageEnds:
    """What stands between rows and views: learnt vectors [H], and which view comes first."""

    image_newline: Tensor
    view_seperator: Tensor  # (sic)
    global_view_pos: str


def end_rows(grid: Tensor, newline: Tensor) -> Tensor:
    """A map [rows, columns, H] as a sequence with `newline` [H] after each row: [rows·(columns + 1), H]."""
    return torch.cat((grid, newline.to(grid.dtype).expand(grid.shape[0], 1, -1)), dim=1).flatten(0, 1)


def assemble_image(features: Tensor, crop: tuple[int, int], ends: ImageEnds) -> Tensor:
    """The vectors of one image [n, H]: global view, separator, local view; in reverse unless global_view_pos is "head".

    features: [1 + tw·th, h², H], the global tile first, then the local ones row by row; crop: (tw, th).
    """
    columns, rows = crop
    side = round(features.shape[1] ** 0.5)
    tiles = features.unflatten(1, (side, side))
    local = tiles[1:].unflatten(0, (rows, columns)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    separator = ends.view_seperator.to(features.dtype)[None]
    views = (end_rows(tiles[0], ends.image_newline), separator, end_rows(local, ends.image_newline))
    return torch.cat(views if ends.global_view_pos == "head" else views[::-1])


def place_images(inputs_embeds: Tensor, images_seq_mask: Tensor, images: Sequence[Tensor]) -> Tensor:
    """`inputs_embeds` [B, T, H] with the images' vectors, in order, at the true positions of the mask [B, T].

    Raises VL2Error when the numbers of positions and vectors differ.
    """
    vectors = torch.cat(list(images)) if images else inputs_embeds.new_zeros(0, inputs_embeds.shape[-1])
    positions = int(images_seq_mask.sum())
    if positions != len(vectors):
        raise VL2Error(f"the prompt has {positions} image positions, the images give {len(vectors)} vectors")
    return inputs_embeds.masked_scatter(images_seq_mask[..., None], vectors.to(inputs_embeds.dtype))

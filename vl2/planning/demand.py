"""What is to be answered: images, text and answer, and what that makes in tiles and tokens."""

from __future__ import annotations

from dataclasses import dataclass

from vl2.errors import VL2Error
from vl2.image import image_crops, image_token_count
from vl2.planning.models import PlannedModel


@dataclass(frozen=True)
class Demand:
    """images: (width, height) in pixels; text_tokens: of question and template.

    context: cache positions to keep room for, None for the model's maximum. max_tiles: as of `vl2 run`.
    pool_bytes: of conversations that a server keeps (`vl2 serve --kv-cache`), None without a server.
    """

    images: tuple[tuple[int, int], ...] = ()
    text_tokens: int = 64
    context: int | None = None
    max_tiles: int | None = None
    prefill_chunk: int = 512
    pool_bytes: int | None = None

    def __post_init__(self) -> None:
        for width, height in self.images:
            if width < 1 or height < 1:
                raise VL2Error(f"an image of {width}x{height} pixels, expected at least 1x1")


@dataclass(frozen=True)
class PromptSize:
    """crops: local tiles (wide, high) of each image. tiles: with the global views. chunk: tokens that one prefill step
    takes. context: cache positions; limit: the model's own."""

    crops: tuple[tuple[int, int], ...]
    tiles: int
    image_tokens: int
    prompt_tokens: int
    chunk: int
    context: int
    limit: int

    @property
    def fits(self) -> bool:
        """Whether the prompt leaves room for an answer in the context."""
        return self.prompt_tokens < self.context


def prompt_size(model: PlannedModel, demand: Demand) -> PromptSize:
    """By the original's rule for resolutions (`vl2.image`). Raises VL2Error for a context the model does not have."""
    limit = model.config.language_config.max_position_embeddings
    context = limit if demand.context is None else demand.context
    if not 1 <= context <= limit:
        raise VL2Error(f"a context of {context:,} tokens was asked for, the model holds 1 to {limit:,}")
    geometry = model.geometry.with_max_tiles(demand.max_tiles)
    crops = tuple((int(wide), int(high)) for wide, high in image_crops(demand.images, geometry))
    image_tokens = sum(image_token_count(crop, geometry) for crop in crops)
    tiles = sum(1 + wide * high for wide, high in crops)
    tokens = image_tokens + demand.text_tokens
    return PromptSize(crops, tiles, image_tokens, tokens, min(demand.prefill_chunk, tokens), context, limit)

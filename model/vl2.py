"""The whole model: tower, projector, merging, decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vl2.config import ModelConfig
from vl2.errors import VL2Error
from vl2.model.attention import Cache
from vl2.model.decoder import Decoder
from vl2.model.merge import ImageEnds, assemble_image, place_images
from vl2.model.projector import Projector
from vl2.model.vision import VisionTower


class DeepseekVL2(nn.Module):
    """DeepSeek-VL2 of any size; parameters are named as in the checkpoint but for `checkpoint.parameter_sources`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        hidden = config.language_config.hidden_size
        self.vision = VisionTower(config.vision_config)
        self.projector = Projector(config.projector_config)
        self.language = Decoder(config.language_config)
        self.image_newline = nn.Parameter(torch.randn(hidden) * hidden**-0.5)
        self.view_seperator = nn.Parameter(torch.randn(hidden) * hidden**-0.5)  # (sic)

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """[N, 3, S, S] normalised pixels to [N, h², H], h = config.tokens_per_side."""
        return self.projector(self.vision(tiles))

    def assemble_images(self, features: Tensor, crops: Tensor) -> list[Tensor]:
        """The vectors [n, H] of each image. features: [Σ(1 + tw·th), h², H]; crops: [images, 2] int, (tw, th).

        Raises VL2Error when the crops do not account for every tile.
        """
        sizes = [1 + width * height for width, height in crops.tolist()]
        if sum(sizes) != len(features):
            raise VL2Error(f"{len(features)} tiles were given, the crops {crops.tolist()} account for {sum(sizes)}")
        ends = ImageEnds(self.image_newline, self.view_seperator, self.config.global_view_pos)
        parts = zip(features.split(sizes), crops.tolist(), strict=True)
        return [assemble_image(part, (width, height), ends) for part, (width, height) in parts]

    def embed(self, input_ids: Tensor, images_seq_mask: Tensor, tiles: Tensor, crops: Tensor) -> Tensor:
        """Embeddings [B, T, H] of a prompt or batch with its images merged in.

        input_ids: [B, T] int64 (ids at image positions have no effect); images_seq_mask: [B, T] bool; tiles:
        [N, 3, S, S] of all rows in order, N may be 0; crops: [images, 2] int64. No padding tiles or crops.
        """
        embeds = self.language.embed_tokens(input_ids)
        if len(crops) == 0 and len(tiles) == 0:
            return place_images(embeds, images_seq_mask, [])
        return place_images(embeds, images_seq_mask, self.assemble_images(self.encode_tiles(tiles), crops))

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, attention_mask: Tensor, past: Cache = ()
    ) -> tuple[Tensor, Cache]:
        """Logits float32 [B, T, V] and the new cache entries; arguments as in `Decoder.forward`."""
        hidden, new = self.language(inputs_embeds, position_ids, attention_mask, past)
        return self.language.logits(hidden), new

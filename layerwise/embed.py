"""Conversations into both models: tiles encoded, tokens looked up, merged; and what each position is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vl2.calib.weights import read_rows
from vl2.layerwise.checkpoints import Pair, StoredWeights
from vl2.layerwise.large import compare_in_pieces
from vl2.layerwise.ledger import Ledger
from vl2.layerwise.parts import States, compare_tensors
from vl2.layerwise.tower import encode_both
from vl2.layerwise.unfold import Unfolded
from vl2.model.merge import ImageEnds, assemble_image, place_images
from vl2.prompt import Prompt

EMBEDDINGS = "embeddings"
_ENDS = ("image_newline", "view_seperator")
_TABLE = "language.embed_tokens.weight"


@dataclass(frozen=True)
class Positions:
    """Of all sequences, one after another: modality uint8 (0 text, 1 image); following: int64, the token that comes
    next if it is part of an answer, else −1."""

    modality: Tensor
    following: Tensor


def positions_of(prompts: Sequence[Prompt], ignore_id: int) -> Positions:
    """What each position of the prompts is."""
    following = np.concatenate([np.append(prompt.target_ids[1:], ignore_id) for prompt in prompts])
    return Positions(_modality(prompts), torch.from_numpy(np.where(following == ignore_id, -1, following)))


def _modality(prompts: Sequence[Prompt]) -> Tensor:
    return torch.from_numpy(np.concatenate([prompt.images_seq_mask for prompt in prompts]).astype(np.uint8))


def embed_both(pair: Pair, prompts: Sequence[Prompt], ledger: Ledger, advance: Callable[[], None]) -> States:
    """Both models' [tokens, H] that enter the first layer, sequence after sequence."""
    tiles = torch.cat([torch.from_numpy(prompt.tiles) for prompt in prompts])
    features = encode_both(pair, tiles, ledger, advance) if len(tiles) else None
    modality = _modality(prompts)
    reference = _merged(pair.reference, prompts, None if features is None else features.reference)
    quantized = _merged(pair.quantized, prompts, None if features is None else features.quantized)
    if torch.equal(reference, quantized):
        quantized = reference
    ledger.sums("stream", EMBEDDINGS).add(reference, quantized - reference, modality)
    return States(reference, quantized, modality)


def compare_tables(pair: Pair, ledger: Ledger) -> None:
    """The token table and the vectors between an image's rows and views."""
    ends = [{name: weights.parameter(name) for name in _ENDS} for weights in (pair.reference, pair.quantized)]
    compare_tensors(pair, ends[0], Unfolded(ends[1]), ledger)
    (name,) = pair.reference.sources[_TABLE]
    compare_in_pieces(pair, name, ledger)


def _merged(weights: StoredWeights, prompts: Sequence[Prompt], features: Tensor | None) -> Tensor:
    ends = ImageEnds(*(weights.parameter(name) for name in _ENDS), weights.config.global_view_pos)
    counts = [len(prompt.tiles) for prompt in prompts]
    parts = features.split(counts) if features is not None else [None] * len(prompts)
    return torch.cat([_merge(weights, *pair, ends) for pair in zip(prompts, parts, strict=True)])


def _merge(weights: StoredWeights, prompt: Prompt, features: Tensor | None, ends: ImageEnds) -> Tensor:
    """As `DeepseekVL2.embed` for one prompt: [T, H]."""
    ids, inverse = torch.unique(torch.from_numpy(prompt.input_ids), return_inverse=True)
    embeds = _looked_up(weights, ids.tolist())[inverse]
    crops = [(int(width), int(height)) for width, height in prompt.crops]
    tiles = features.split([1 + width * height for width, height in crops]) if crops else ()
    images = [assemble_image(part, crop, ends) for part, crop in zip(tiles, crops, strict=True)]
    return place_images(embeds[None], torch.from_numpy(prompt.images_seq_mask)[None], images)[0]


def _looked_up(weights: StoredWeights, ids: Sequence[int]) -> Tensor:
    (name,) = weights.sources[_TABLE]
    if weights.form_of(name) is None:
        return read_rows(weights, _TABLE, ids)
    return torch.cat([weights.rows(name, token, 1) for token in ids])

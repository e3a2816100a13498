"""The token-embedding table and the two learnt image vectors as one safetensors file, read by memory map."""

from __future__ import annotations

import json

from vl2.export.checkpoint import Checkpoint
from vl2.export.passes.store_weights import PlacedWeight
from vl2.export.schemes import storage_of
from vl2.export.weights import Weight
from vl2.manifest import Embeddings, StoredTensor

FILE_NAME = "embeddings.safetensors"

# Name in the file to the model's parameter; the vectors are few and stand last.
_PARAMETERS = {
    "embed_tokens": "language.embed_tokens.weight",
    "image_newline": "image_newline",
    "view_seperator": "view_seperator",  # (sic)
}
_HEADER_ALIGNMENT = 64


def place_embeddings(checkpoint: Checkpoint, scheme: str) -> list[PlacedWeight]:
    """The file's tensors, without gaps, which the format forbids."""
    placed, end = [], 0
    for name, parameter in _PARAMETERS.items():
        shape = checkpoint.shapes[parameter]
        placed.append(PlacedWeight(name, Weight(parameter, shape), storage_of(parameter, shape, scheme), end))
        end = placed[-1].end
    return placed


def embeddings_header(placed: list[PlacedWeight]) -> bytes:
    """Length and JSON header of the file, padded with blanks."""
    tensors = {
        place.name: {
            "dtype": place.storage.safetensors_dtype,
            "shape": list(place.weight.shape),
            "data_offsets": [place.offset, place.end],
        }
        for place in placed
    }
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def embeddings_facts(placed: list[PlacedWeight]) -> Embeddings:
    """What the manifest says of the file."""
    return Embeddings(
        FILE_NAME, {place.name: StoredTensor(place.storage.safetensors_dtype, place.weight.shape) for place in placed}
    )

"""The token-embedding table and the two learnt image vectors as one safetensors file, read by memory map."""

from __future__ import annotations

import json

from vl2.export.checkpoint import Checkpoint
from vl2.export.packed_storage import SCALES, PackedStorage
from vl2.export.passes.store_weights import PlacedWeight
from vl2.export.storing import Storing
from vl2.export.weights import Weight
from vl2.manifest import SCALES_SUFFIX, Embeddings, StoredTensor

FILE_NAME = "embeddings.safetensors"

# Name in the file to the model's parameter; the vectors are few and stand last.
_PARAMETERS = {
    "embed_tokens": "language.embed_tokens.weight",
    "image_newline": "image_newline",
    "view_seperator": "view_seperator",  # (sic)
}
_HEADER_ALIGNMENT = 64


def place_embeddings(checkpoint: Checkpoint, storing: Storing) -> list[PlacedWeight]:
    """The file's tensors, without gaps, which the format forbids; a packed table is followed by its scales."""
    placed, end = [], 0
    for name, parameter in _PARAMETERS.items():
        for storage in storing.parts_of(parameter):
            scales = isinstance(storage, PackedStorage) and storage.part == SCALES
            weight = Weight(parameter, checkpoint.shapes[parameter])
            placed.append(PlacedWeight(f"{name}{SCALES_SUFFIX}" if scales else name, weight, storage, end))
            end = placed[-1].end
    return placed


def embeddings_header(placed: list[PlacedWeight]) -> bytes:
    """Length and JSON header of the file, padded with blanks."""
    tensors = {
        place.name: {
            "dtype": place.storage.safetensors_dtype,
            "shape": list(place.shape),
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
        FILE_NAME, {place.name: StoredTensor(place.storage.safetensors_dtype, place.shape) for place in placed}
    )

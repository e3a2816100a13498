"""Compares a bundle's graphs with the PyTorch model on a prompt with an image, then on greedy decoding.

The graphs run first and choose the tokens; the reference then sees prompt and answer in one pass without a cache. If at
every position its best token is the one that the graphs chose, greedy decoding gives the same text.
"""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vl2.errors import VL2Error
from vl2.export.checkpoint import Checkpoint
from vl2.export.choice import UNPACKED_SCHEME
from vl2.export.reference import StreamedModel
from vl2.export.session import GraphSession
from vl2.export.storing import EXACT, FAST, TRT
from vl2.file_hashes import Progress
from vl2.manifest import SCALES_SUFFIX, Manifest
from vl2.mapped_pages import bounded_file_pages
from vl2.model.merge import ImageEnds, assemble_image
from vl2.prompt import Message, Processor, Prompt
from vl2.safetensors_file import read_header

# Of the logits' standard deviation; float32 in another order of sums differs by about a hundredth of this.
LOGITS_BOUND = 1e-3
FEATURES_BOUND = 1e-3
# Where rounding into an INT8 cache turns the other way, a code moves by one: up to 1/127 of its row's largest value.
_INT8_CACHE_BOUND = 1e-2
# Activations rounded to INT8 in groups of 32 err by up to 1/254 of a group's largest value before every product.
_FAST_BOUND = 2e-1

# Activations of float16 before and after every product and plugin: half a unit of 2^-11, and the random sum of about
# ten roundings a layer; a token near the router's threshold may take another expert.
HALF_BOUND = 5e-2

_DECODE_STEPS = 8
_QUESTION = "<image>\nWhat is shown here?"
_RESIDENT_LIMIT_BYTES = 256 << 20


@dataclass(frozen=True)
class Figures:
    """The parity run in numbers; differences in standard deviations of the reference."""

    features_difference: float
    logits_difference: float
    chunked_difference: float
    tokens_equal: bool
    prompt_tokens: int
    decode_steps: int
    bound: float = LOGITS_BOUND
    mode: str = EXACT
    activations: str = "float32"

    @property
    def passed(self) -> bool:
        """Whether everything is within its bound; rounded activations may choose another token where two are close."""
        largest, exact = max(self.logits_difference, self.chunked_difference), self.exact
        features_bound = FEATURES_BOUND if exact else self.bound
        tokens = self.tokens_equal or not exact
        return tokens and largest <= self.bound and self.features_difference <= features_bound

    @property
    def exact(self) -> bool:
        """Whether only the order of float32 sums differs."""
        return self.mode == EXACT and self.activations == "float32"


def verify_bundle(folder: Path, manifest: Manifest, checkpoint: Checkpoint, progress: Progress) -> Manifest:
    """The manifest with the figures in `verify`. Raises VL2Error when the graphs and the model disagree."""
    progress("verify", 0, 3)
    export_peak = _peak_rss_bytes()
    with bounded_file_pages(folder, _RESIDENT_LIMIT_BYTES):
        figures = compare(folder, manifest, checkpoint, progress)
    if not figures.passed:
        raise VL2Error(
            f"the exported graphs and the PyTorch model disagree: {figures}, allowed are {figures.bound} of the "
            f"logits' standard deviation{' and equal tokens' if figures.exact else ''}",
            "this is a defect of vl2 or of the installed onnxruntime; `--no-verify` writes the bundle all the same",
        )
    facts: dict[str, Any] = {"status": "passed", **vars(figures)}
    facts |= {"export_peak_rss_bytes": export_peak, "peak_rss_bytes": _peak_rss_bytes()}
    return replace(manifest, verify=facts)


def compare(folder: Path, manifest: Manifest, checkpoint: Checkpoint, progress: Progress) -> Figures:
    """Runs graphs and reference on the same prompt."""
    prompt = _prompt(Processor.from_folder(folder), manifest.image.tile_size)
    scheme = UNPACKED_SCHEME if checkpoint.quantized else manifest.scheme
    kv_cache = _narrow_cache(manifest)
    reference = StreamedModel(checkpoint, scheme, kv_cache)
    features = GraphSession(folder, manifest, "vision").run([prompt.tiles])[0]
    wanted_features = reference.encode_tiles(torch.from_numpy(prompt.tiles))
    progress("verify", 1, 3)
    embeds = _merge(prompt, torch.from_numpy(features), _bundle_tables(folder, manifest, prompt.input_ids), manifest)
    logits, tokens, chunked = _decode(folder, manifest, embeds.numpy())
    progress("verify", 2, 3)
    tables = (reference.embedding_rows(torch.from_numpy(prompt.input_ids)), *map(reference.vector, _VECTORS))
    wanted_embeds = _merge(prompt, wanted_features, tables, manifest)
    answer = reference.embedding_rows(torch.tensor(tokens[:-1]))
    wanted = reference.logits(torch.cat((wanted_embeds, answer))[None], len(tokens)).numpy()
    progress("verify", 3, 3)
    return Figures(
        features_difference=_difference(features, wanted_features.numpy()),
        logits_difference=_difference(logits, wanted),
        chunked_difference=_difference(chunked, wanted[:1]),
        tokens_equal=bool((wanted.argmax(-1) == np.array(tokens)).all()),
        prompt_tokens=len(prompt.input_ids),
        decode_steps=_DECODE_STEPS,
        bound=_bound(manifest, kv_cache),
        mode=manifest.mode,
        activations="float16" if manifest.lowering == TRT else "float32",
    )


def _bound(manifest: Manifest, kv_cache: str | None) -> float:
    if manifest.lowering == TRT:
        return HALF_BOUND
    return _FAST_BOUND if manifest.mode == FAST else _INT8_CACHE_BOUND if kv_cache == "int8" else LOGITS_BOUND


def _narrow_cache(manifest: Manifest) -> str | None:
    """The element type of the decoder's caches where it is less than the reference's float32."""
    decoder = manifest.graphs["decoder"]
    found = {port.name: port.dtype for port in decoder.inputs}
    narrow = {found[ports.past] for ports in decoder.cache} - {"float32"}
    return narrow.pop() if narrow else None


_VECTORS = ("image_newline", "view_seperator")  # (sic)
Tables = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _prompt(processor: Processor, side: int) -> Prompt:
    """A question about an image of smooth colours and noise, cut into one local tile."""
    rows, columns = np.mgrid[0:side, 0:side] / side
    colours = np.stack((rows, columns, (rows + columns) / 2), axis=-1) * 200
    noise = np.random.default_rng(0).integers(0, 56, colours.shape)
    image = Image.fromarray((colours + noise).astype(np.uint8))
    return processor.encode([Message("user", _QUESTION, [image]), Message("assistant", "")])


def _bundle_tables(folder: Path, manifest: Manifest, ids: np.ndarray) -> Tables:
    """Token rows and the two image vectors as the bundle's embeddings file has them, float32."""
    path = folder / manifest.embeddings.file
    dtypes = {"F32": np.float32, "F16": np.float16, "I8": np.int8}
    maps = {
        name: np.memmap(path, dtypes[entry.dtype], "r", entry.offset, entry.shape)
        for name, entry in read_header(path).items()
    }
    arrays = {name: array[ids] if array.ndim == 2 else array for name, array in maps.items()}
    rows = arrays["embed_tokens"].astype(np.float32)
    if "embed_tokens" + SCALES_SUFFIX in arrays:
        scales = arrays["embed_tokens" + SCALES_SUFFIX].astype(np.float32)
        rows = (rows.reshape(*scales.shape, -1) * scales[..., None]).reshape(rows.shape)
    return tuple(torch.from_numpy(array.astype(np.float32)) for array in (rows, *(arrays[name] for name in _VECTORS)))


def _merge(prompt: Prompt, features: torch.Tensor, tables: Tables, manifest: Manifest) -> torch.Tensor:
    """Embeddings [T, H] of the prompt with its one image in place."""
    rows, newline, separator = tables
    ends = ImageEnds(newline, separator, manifest.image.global_view_pos)
    crop = tuple(int(side) for side in prompt.crops[0])
    merged = rows.clone()
    merged[torch.from_numpy(prompt.images_seq_mask)] = assemble_image(features, crop, ends)
    return merged


def _decode(folder: Path, manifest: Manifest, embeds: np.ndarray) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Greedy decoding: logits [1 + steps, V], the tokens they choose, and the first logits after chunked prefill."""
    session = GraphSession(folder, manifest, "decoder")
    chunked = session.prefill(embeds, chunk=math.ceil(len(embeds) / 3))[0]
    logits, cache = session.prefill(embeds, chunk=len(embeds), room=_DECODE_STEPS)
    rows, tokens = [logits], [int(logits.argmax())]
    for step in range(_DECODE_STEPS):
        token = np.array(tokens[-1:])
        row = _bundle_tables(folder, manifest, token)[0].numpy()
        logits, cache = session.step(row, len(embeds) + step, cache)
        rows.append(logits)
        tokens.append(int(logits.argmax()))
    return np.concatenate(rows), tokens, chunked


def _difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference in standard deviations of `wanted`; infinite where something is not finite."""
    largest = float(np.abs(got - wanted).max())
    return largest / float(wanted.std()) if math.isfinite(largest) else math.inf


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

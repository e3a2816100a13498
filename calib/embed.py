"""Calibration data to a calibration set: conversations through processor, tower and projector, images merged in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from vl2.calib.calibration_set import (
    EMBEDDINGS_NAME,
    CalibrationSet,
    DataFacts,
    SequenceFacts,
    checkpoint_source,
    new_description,
    write_description,
)
from vl2.calib.data import CalibrationData, CheckedSample
from vl2.calib.progress import Report, Work, silent
from vl2.calib.statistics import Moments
from vl2.calib.tensor_file import read_tensor, shapes_of, write_tensors
from vl2.calib.tiles import encode_tiles, tile_steps
from vl2.calib.weights import Weights, open_weights, read_rows
from vl2.errors import VL2Error
from vl2.json_file import read_json
from vl2.model.merge import ImageEnds, assemble_image, place_images
from vl2.prompt import Processor, Prompt
from vl2.safetensors_file import TensorEntry, read_header

_IDENTITY_NAME = "identity.json"
_TEXT_WORK = 0.01  # of embedding a conversation's text, in tiles


@dataclass(frozen=True)
class EmbedOptions:
    """tiles_at_once: tiles that pass the tower together, at least those of one conversation: more take memory, 10 MB
    each in the published tower, and save reading the weights again. report: called with the progress."""

    tiles_at_once: int = 16
    report: Report = silent


def embed_calibration(
    checkpoint: Path, data: CalibrationData, out: Path, options: EmbedOptions | None = None
) -> CalibrationSet:
    """Makes the calibration set folder `out` and returns its description.

    Works in `out`.partial, from which an interrupted run goes on, and renames it when it is whole. Raises VL2Error when
    `out` exists and when an unfinished folder belongs to other data or another checkpoint.
    """
    options = options or EmbedOptions()
    if out.exists():
        raise VL2Error(f"{out} exists already", "remove it, or choose another name")
    weights, processor = open_weights(checkpoint), Processor.from_folder(checkpoint)
    source = checkpoint_source(checkpoint)
    partial = out.with_name(f"{out.name}.partial")
    _begin(partial, {"files": source.files, "data": data.sha256, "tiles_at_once": options.tiles_at_once})
    chunks = list(_chunks(data.samples, options.tiles_at_once))
    paths = [partial / f"part_{index:05}.safetensors" for index in range(len(chunks))]
    finished = sum(_work(chunk) for chunk, path in zip(chunks, paths, strict=True) if path.exists())
    work = Work(sum(_work(chunk) for chunk in chunks), options.report, finished)
    for chunk, path in zip(chunks, paths, strict=True):
        if not path.exists():
            _embed_chunk(weights, processor, chunk, path, work)
    hidden_size = weights.config.language_config.hidden_size
    description = new_description(source, _data_facts(data), tuple(map(_sequence_facts, data.samples)), hidden_size)
    whole = partial / "whole"
    whole.mkdir(exist_ok=True)
    _join(whole, paths, description)
    write_description(whole, description)
    whole.replace(out)
    discard_unfinished(out)
    return description


def embed_again(checkpoint: Path, samples: Sequence[CheckedSample], replaced: Mapping[str, Tensor]) -> Tensor:
    """Embeddings [tokens, H] float32 of conversations, as `embed_calibration` makes them, with other tensors in tower
    and projector, by the checkpoint's names."""
    weights, processor = open_weights(checkpoint), Processor.from_folder(checkpoint)
    hidden = []
    for checked in samples:
        prompt = processor.encode(checked.sample.opened(), inference=not checked.sample.is_answered)
        with torch.inference_mode():
            features = encode_tiles(weights, torch.from_numpy(prompt.tiles), {}, lambda: None, replaced)
            hidden.append(merge_prompt(weights, prompt, features))
    return torch.cat(hidden)


def discard_unfinished(out: Path) -> None:
    """Removes what an interrupted `embed_calibration(…, out)` left, if anything."""
    shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)


def _begin(partial: Path, identity: dict) -> None:
    path = partial / _IDENTITY_NAME
    if path.exists() and read_json(path) != identity:
        raise VL2Error(f"{partial} was begun with other data, options or another checkpoint",
                       "remove the folder to begin anew, or go on with what it was begun with")
    partial.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(identity), encoding="utf-8")


def _chunks(samples: tuple[CheckedSample, ...], tiles: int) -> Iterator[list[CheckedSample]]:
    """Consecutive samples of at most so many tiles together, or one sample that alone has more."""
    chunk: list[CheckedSample] = []
    for sample in samples:
        if chunk and sum(other.tiles for other in chunk) + sample.tiles > tiles:
            yield chunk
            chunk = []
        chunk.append(sample)
    if chunk:
        yield chunk


def _work(chunk: list[CheckedSample]) -> float:
    return sum(sample.tiles + _TEXT_WORK for sample in chunk)


def _embed_chunk(weights: Weights, processor: Processor, chunk: list[CheckedSample], path: Path, work: Work) -> None:
    """Writes hidden, modality and the tower's sums for some conversations."""
    prompts = [processor.encode(c.sample.opened(), inference=not c.sample.is_answered) for c in chunk]
    moments: dict[str, Moments] = {}
    tiles = torch.cat([torch.from_numpy(prompt.tiles) for prompt in prompts])
    share = len(tiles) / tile_steps(weights)
    features = encode_tiles(weights, tiles, moments, lambda: work.advance("images", share))
    parts = features.split([len(prompt.tiles) for prompt in prompts])
    hidden = torch.cat([merge_prompt(weights, *pair) for pair in zip(prompts, parts, strict=True)])
    modality = torch.cat([torch.from_numpy(prompt.images_seq_mask) for prompt in prompts]).to(torch.uint8)
    tensors = {"hidden": hidden, "modality": modality}
    for name, moment in moments.items():
        tensors |= {f"{name}/square": moment.square, f"{name}/magnitude": moment.magnitude,
                    f"{name}/count": torch.tensor([moment.count])}
    write_tensors(path, shapes_of(tensors), tensors.items())
    work.advance("text", len(chunk) * _TEXT_WORK)


def merge_prompt(weights: Weights, prompt: Prompt, features: Tensor) -> Tensor:
    """Embeddings [T, H] float32 of one prompt, as `DeepseekVL2.embed`; features: [tiles, h², H] of its images."""
    ids, inverse = torch.unique(torch.from_numpy(prompt.input_ids), return_inverse=True)
    embeds = read_rows(weights, "language.embed_tokens.weight", ids.tolist())[inverse]
    ends = ImageEnds(weights.parameter("image_newline"), weights.parameter("view_seperator"),
                     weights.config.global_view_pos)
    crops = [(int(width), int(height)) for width, height in prompt.crops]
    parts = features.split([1 + width * height for width, height in crops]) if crops else ()
    images = [assemble_image(part, crop, ends) for part, crop in zip(parts, crops, strict=True)]
    return place_images(embeds[None], torch.from_numpy(prompt.images_seq_mask)[None], images)[0]


def _join(folder: Path, paths: list[Path], description: CalibrationSet) -> None:
    """One embeddings.safetensors of all parts, and one statistics file for each tower block and the projector."""
    parts = [read_header(path) for path in paths]
    lengths = torch.tensor([sequence.tokens for sequence in description.sequences])
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    position = torch.arange(description.tokens) - (lengths.cumsum(0) - lengths)[sequence]
    index = {"sequence": sequence.int(), "position": position.int()}
    shapes = {"hidden": (torch.float32, (description.tokens, description.hidden_size)),
              "modality": (torch.uint8, (description.tokens,)), **shapes_of(index)}
    pieces = ((name, read_tensor(part[name])) for name in ("hidden", "modality") for part in parts)
    write_tensors(folder / EMBEDDINGS_NAME, shapes, chain(pieces, index.items()))
    files: dict[str, dict[str, Tensor]] = {}
    for name, moments in _total_moments(parts).items():
        file, site = name.split("/")
        files.setdefault(file, {}).update(moments.tensors(site))
    for file, tensors in files.items():
        write_tensors(folder / f"{file}.safetensors", shapes_of(tensors), tensors.items())


def _total_moments(parts: list[dict[str, TensorEntry]]) -> dict[str, Moments]:
    totals: dict[str, Moments] = {}
    for part in parts:
        for name in (key.removesuffix("/square") for key in part if key.endswith("/square")):
            square, magnitude, count = (read_tensor(part[f"{name}/{key}"]) for key in ("square", "magnitude", "count"))
            totals.setdefault(name, Moments.empty(len(square)))
            totals[name] += Moments(square, magnitude, int(count))
    return totals


def _sequence_facts(checked: CheckedSample) -> SequenceFacts:
    return SequenceFacts(checked.sample.source, checked.tokens, checked.image_tokens, checked.sample.is_answered,
                         checked.image_sha256)


def _data_facts(data: CalibrationData) -> DataFacts:
    return DataFacts(data.format, data.path, data.sha256, data.rows, len(data.bad_rows), data.ignored, data.left_out,
                     data.options)

"""Opening a bundle: every check that can fail comes before the first weight is read."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from vl2.backends import ENGINE_LOWERING
from vl2.engine_record import written_name
from vl2.errors import VL2Error
from vl2.manifest import CACHE_ROW, Manifest, Port, check_files, check_sizes, read_manifest
from vl2.memory import require_memory
from vl2.prompt import Processor
from vl2.runtime.choice import choose_backend
from vl2.runtime.embeddings import Embeddings
from vl2.runtime.engine import Engine
from vl2.runtime.image_cache import ImageCache
from vl2.runtime.image_store import ImageStore
from vl2.runtime.model import Model
from vl2.runtime.options import BundleOptions

_REMEDY = "export the bundle again"


def open_bundle(path: str | os.PathLike, options: BundleOptions | None = None) -> Model:
    """The model in a bundle folder, ready to be asked; weights are read when they are needed.

    Raises VL2Error when a file is missing or changed, the schema is newer, files contradict each other, the weights
    need more memory than there is, or the wanted backend cannot be had.
    """
    folder, options = Path(path), options or BundleOptions()
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    check_ports(manifest)
    # Before all that takes time: whether anything here runs it.
    open_backend = choose_backend(folder, manifest, options)
    if options.check_memory and manifest.lowering != ENGINE_LOWERING:
        require_memory(weight_bytes(manifest), f"loading the weights of {folder}")
    if options.check_hashes:
        check_files(folder, manifest, options.progress)
    processor = Processor.from_folder(folder)
    check_processor(manifest, processor, folder)
    # Only now: the files describe the original's rule.
    processor = replace(processor, geometry=processor.geometry.with_max_tiles(options.max_tiles))
    store = None if options.cache_dir is None else ImageStore(Path(options.cache_dir), options.cache_dir_bytes)
    images, embeddings = ImageCache(options.image_cache_bytes, store), Embeddings(folder, manifest)
    return Model(Engine(manifest, processor, embeddings, open_backend(), images), options.kv_cache_bytes)


def weight_bytes(manifest: Manifest) -> int:
    """What the graphs' weights take; the embedding table is left out, of it only single rows are read."""
    return sum(manifest.files[graph.data_file].size_bytes for graph in manifest.graphs.values())


def check_ports(manifest: Manifest) -> None:
    """Raises VL2Error unless the graphs have the inputs and outputs that this runtime binds."""
    image, language = manifest.image, manifest.language
    side, hidden = image.tile_size, language.hidden_size
    in_place = "decoder" in manifest.graphs and manifest.graphs["decoder"].in_place
    slots = in_place and manifest.graphs["decoder"].slots
    sight = {"past_length": ("int64", ())} if in_place else {"attention_mask": ("bool", (None, None))}
    if slots:
        sight = {"past_length": ("int64", (None,)), CACHE_ROW: ("int64", (None,))}
    expected = {
        ("vision", "inputs"): {"tiles": ("float32", (None, 3, side, side))},
        ("vision", "outputs"): {"image_features": ("float32", (None, image.tokens_per_side ** 2, hidden))},
        ("decoder", "inputs"): {"inputs_embeds": ("float32", (None, None, hidden)),
                                "position_ids": ("int64", (None, None)), **sight},
        ("decoder", "outputs"): {"logits": ("float32", (None, language.vocab_size))},
    }
    if manifest.lowering == ENGINE_LOWERING:
        expected["decoder", "outputs"] |= _written_caches(manifest)
    for (graph, way), ports in expected.items():
        if graph not in manifest.graphs:
            raise VL2Error(f"the manifest lists no graph {graph!r}", _REMEDY)
        found = {port.name: port for port in getattr(manifest.graphs[graph], way)}
        cache = {name for pair in manifest.graphs[graph].cache for name in (pair.past, pair.new)}
        if found.keys() - cache != ports.keys():
            raise VL2Error(f"the {way} of the graph {graph} are {sorted(found.keys() - cache)}, "
                           f"expected {sorted(ports)}", _REMEDY)
        for name, (dtype, shape) in ports.items():
            _check_port(found[name], dtype, shape)
    _check_cache(manifest)


def _written_caches(manifest: Manifest) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """The caches as outputs, at their inputs' addresses: what graphs for engines have besides."""
    decoder = manifest.graphs.get("decoder")
    ports = {port.name: port for port in decoder.inputs} if decoder else {}
    return {written_name(pair.past): (ports[pair.past].dtype, (None, None, *ports[pair.past].shape[2:]))
            for pair in (decoder.cache if decoder else ())}


def _check_port(port: Port, dtype: str, shape: tuple[int | None, ...]) -> None:
    """None in `shape` stands for a dynamic side."""
    found = tuple(None if isinstance(side, str) else side for side in port.shape)
    if (port.dtype, found) != (dtype, shape):
        raise VL2Error(f"the port {port.name} is {port.dtype} {list(port.shape)}, "
                       f"expected {dtype} {['any' if side is None else side for side in shape]}", _REMEDY)


def _check_cache(manifest: Manifest) -> None:
    graph = manifest.graphs["decoder"]
    inputs, outputs = ({port.name: port for port in ports} for ports in (graph.inputs, graph.outputs))
    if not graph.cache:
        raise VL2Error("the decoder has no cache ports", _REMEDY)
    for pair in graph.cache:
        past = inputs[pair.past]
        fixed = past.shape[2:]
        if len(past.shape) < 3 or not all(isinstance(side, int) for side in fixed):
            raise VL2Error(f"the port {past.name} is {list(past.shape)}, expected [batch, past, fixed …]", _REMEDY)
        if (pair.new is None) != graph.in_place:
            raise VL2Error("some caches are written in place and some are not", _REMEDY)
        if pair.new is not None:
            _check_port(outputs[pair.new], past.dtype, (None, None, *fixed))


def check_processor(manifest: Manifest, processor: Processor, folder: Path) -> None:
    """Raises VL2Error when processor and tokenizer files contradict the manifest."""
    tokens = {name: getattr(processor.special, name) for name in ("bos_id", "eos_id", "pad_id", "image_id")}
    facts = (("image geometry", processor.geometry, manifest.image.geometry),
             ("tokens per side", processor.geometry.tokens_per_side, manifest.image.tokens_per_side),
             *((name, found, getattr(manifest.tokens, name)) for name, found in tokens.items()))
    for name, found, expected in facts:
        if found != expected:
            raise VL2Error(f"{folder}: {name} is {found} in the processor's files, {expected} in the manifest", _REMEDY)
    if processor.largest_id >= manifest.language.vocab_size:
        raise VL2Error(f"{folder}: the tokenizer has id {processor.largest_id}, "
                       f"the model {manifest.language.vocab_size} ids",
                       "the tokenizer belongs to another model; copy the right one and export again")

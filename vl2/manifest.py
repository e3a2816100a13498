"""The manifest of a bundle: what its files are, what its graphs take and give. Read strictly, written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from vl2.engine_record import EngineRecord
from vl2.errors import VL2Error
from vl2.file_hashes import HashCache, Progress, sha256_of
from vl2.image import ImageGeometry
from vl2.json_file import from_json, read_json, to_json

# The newest that is read. 2: the decoder's caches have slots (`Graph.slots`); all else is as in 1.
SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
SCALES_SUFFIX = ".scales"
# The decoder's input that says which rows of the caches hold the sequences of a batch.
CACHE_ROW = "cache_row"
_REMEDY = "copy the bundle again, or export it again with --force"


@dataclass(frozen=True)
class Source:
    """Where the weights came from: folder name or hub id, and sha256 by file name."""

    name: str
    files: dict[str, str]


@dataclass(frozen=True)
class ImageFacts:
    """Image geometry; lengths in pixels, resolutions as (width, height)."""

    tile_size: int
    patch_size: int
    downsample_ratio: int
    tokens_per_side: int
    candidate_resolutions: tuple[tuple[int, int], ...]
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    global_view_pos: str

    @property
    def geometry(self) -> ImageGeometry:
        """The same facts as preprocessing takes them."""
        return ImageGeometry(self.tile_size, self.patch_size, self.downsample_ratio,
                             self.candidate_resolutions, self.image_mean, self.image_std)


@dataclass(frozen=True)
class LanguageFacts:
    """The decoder as the runtime needs to know it; attention is "mha" or "mla"."""

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    attention: str
    max_position_embeddings: int


@dataclass(frozen=True)
class TokenIds:
    """Ids of the tokens placed by hand."""

    bos_id: int
    eos_id: int
    pad_id: int
    image_id: int


@dataclass(frozen=True)
class Port:
    """A graph's input or output; a dynamic side of the shape is a string."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class CachePorts:
    """An input that takes past entries and the output that gives the new ones.

    new None: the input is a whole buffer [batch or slots, capacity, …], which the graph writes itself.
    """

    past: str
    new: str | None


@dataclass(frozen=True)
class Graph:
    """An ONNX file, its weights and its ports."""

    file: str
    data_file: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    cache: tuple[CachePorts, ...] = ()

    @property
    def in_place(self) -> bool:
        """Whether it writes its caches itself."""
        return any(ports.new is None for ports in self.cache)

    @property
    def slots(self) -> bool:
        """Whether it takes sequences of unequal lengths in one batch, each from any row of its buffers."""
        return any(port.name == CACHE_ROW for port in self.inputs)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the embeddings file; dtype as safetensors names it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Embeddings:
    """The safetensors file read by memory map. A table of INT8 codes has its scales beside it, named with
    `SCALES_SUFFIX`: row · scale of its group of neighbouring columns."""

    file: str
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class FileFacts:
    """Size and sha256 of one file."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ModuleFacts:
    """Parameter count and stored size of one module."""

    parameters: int
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """manifest.json, field by field; docs/formats.md describes it."""

    vl2_version: str
    variant: str
    scheme: str
    source: Source
    image: ImageFacts
    language: LanguageFacts
    tokens: TokenIds
    graphs: dict[str, Graph]
    embeddings: Embeddings
    files: dict[str, FileFacts]
    modules: dict[str, ModuleFacts]
    tools: dict[str, Any]
    conversion: dict[str, Any]
    verify: dict[str, Any]
    schema_version: int = 1
    # Which operators the graphs use; bundles of before these keys have standard ones and floats only.
    lowering: str = "portable"
    quantization: dict | None = None
    # Of the operators of the lowering `cpu`: "exact", or "fast" with activations rounded to INT8.
    mode: str = "exact"
    # By target, of the lowering `trt`.
    engines: dict[str, EngineRecord] = field(default_factory=dict)

    @property
    def operators(self) -> str:
        """The lowering and, where it is not exact, its mode."""
        return self.lowering if self.mode == "exact" else f"{self.lowering} {self.mode}"

    def to_dict(self) -> dict[str, Any]:
        """The manifest as JSON has it."""
        facts = to_json(self)
        return {"schema_version": facts.pop("schema_version"), **facts}


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """The manifest of a bundle folder.

    Raises VL2Error for a folder that is no bundle, a newer or unknown schema, a key that is missing, unknown or
    mistyped, and a file name that leaves the folder.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        found = "has no manifest.json" if Path(folder).is_dir() else "is not a folder"
        raise VL2Error(f"{folder} {found}, so it is not a bundle", "make one with `vl2-export CHECKPOINT --out BUNDLE`")
    content = read_json(path)
    _check_schema(content.get("schema_version"), path)
    manifest = from_json(Manifest, content, str(path))
    _check_names(manifest, path)
    return manifest


def write_manifest(folder: str | os.PathLike, manifest: Manifest) -> Path:
    """Writes manifest.json beside its place and renames it there; returns its path."""
    path = Path(folder) / MANIFEST_NAME
    _check_names(manifest, path)
    unfinished = path.with_suffix(".json.part")
    text = json.dumps(manifest.to_dict(), indent=2, ensure_ascii=False) + "\n"
    with unfinished.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, path)
    return path


def file_facts(path: Path) -> FileFacts:
    """Size and sha256 of a file, for the manifest."""
    return FileFacts(path.stat().st_size, sha256_of(path))


def check_sizes(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Raises VL2Error naming the first file of the bundle that is missing or has another size."""
    for name, facts in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file():
            raise VL2Error(f"{path} is missing; the manifest lists it with {facts.size_bytes:,} bytes", _REMEDY)
        if path.stat().st_size != facts.size_bytes:
            raise VL2Error(f"{path} has {path.stat().st_size:,} bytes, expected {facts.size_bytes:,}", _REMEDY)


def check_files(
    folder: str | os.PathLike, manifest: Manifest, progress: Progress | None = None, cache: HashCache | None = None
) -> None:
    """As `check_sizes`, then every sha256; big files that have not changed since they last passed are not read.

    progress: gets ("checking files", bytes done, bytes in all).
    """
    check_sizes(folder, manifest)
    cache = cache or HashCache()
    report = _counted(progress, sum(facts.size_bytes for facts in manifest.files.values()))
    for name, facts in manifest.files.items():
        path = Path(folder) / name
        found = cache.sha256_of(path, report)
        if found != facts.sha256:
            raise VL2Error(f"{path} has sha256 {found}, expected {facts.sha256}: its content was changed", _REMEDY)
    cache.save()


def _counted(progress: Progress | None, total_bytes: int):
    done_bytes = 0

    def report(block_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += block_bytes
        if progress is not None:
            progress("checking files", done_bytes, total_bytes)

    return report


def _check_schema(version: Any, path: Path) -> None:
    if type(version) is not int or version < 1:
        raise VL2Error(f"{path}: schema_version is {version!r}, expected a whole number from 1 to {SCHEMA_VERSION}",
                       "export the bundle again")
    if version > SCHEMA_VERSION:
        raise VL2Error(f"{path}: schema_version is {version}, this vl2 reads up to {SCHEMA_VERSION}",
                       "update vl2-edge, or export the bundle with this version")


def _check_names(manifest: Manifest, path: Path) -> None:
    referenced = [manifest.embeddings.file]
    for graph in manifest.graphs.values():
        referenced += [graph.file, graph.data_file]
    for name in [*manifest.files, *referenced]:
        if not _stays_inside(name):
            raise VL2Error(f"{path}: file name {name!r} is not a plain name inside the bundle",
                           "do not use this bundle; get it from a source you trust")
    for record in manifest.engines.values():
        referenced += record.files.values()
    _check_known(referenced, manifest.files, path)
    for graph_name, graph in manifest.graphs.items():
        inputs, outputs = ({port.name: None for port in ports} for ports in (graph.inputs, graph.outputs))
        _check_known([ports.past for ports in graph.cache], inputs, f"{path}: graphs.{graph_name}.inputs")
        given = [ports.new for ports in graph.cache if ports.new is not None]
        _check_known(given, outputs, f"{path}: graphs.{graph_name}.outputs")


def _stays_inside(name: str) -> bool:
    plain = name not in ("", ".", "..", MANIFEST_NAME) and name.isprintable()
    return plain and PurePosixPath(name).name == name and PureWindowsPath(name).name == name


def _check_known(names: list[str], known: Mapping[str, Any], where: object) -> None:
    for name in names:
        if name not in known:
            raise VL2Error(f"{where} does not list {name!r}", "the bundle is incomplete; export it again")

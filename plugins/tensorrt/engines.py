"""Engines of a bundle: which shapes they take, and building them into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vl2.engine_record import EngineRecord
from vl2.errors import VL2Error
from vl2.folder_lock import locked_folder
from vl2.manifest import Graph, Manifest, file_facts, read_manifest, write_manifest
from vl2.plugins.tensorrt.build import EngineFacts, EngineJob, Range, build_apart
from vl2.plugins.tensorrt.flavour import TENSORRT
from vl2.plugins.tensorrt.sources import plugin_hash

# graph, index, number of graphs
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EngineSizes:
    """Largest shapes: tokens of the cache, tokens of a prefill step, tiles of a run of the tower."""

    context: int = 4096
    prefill_chunk: int = 512
    tiles: int = 10

    def __post_init__(self) -> None:
        if min(self.context, self.prefill_chunk, self.tiles) < 1 or self.prefill_chunk > self.context:
            raise VL2Error(f"engines for a context of {self.context} tokens, chunks of {self.prefill_chunk} and "
                           f"{self.tiles} tiles", "each is 1 or more, and a chunk is no longer than the context")


@dataclass(frozen=True)
class EngineTarget:
    """name: of the target; flavour: which TensorRT; compute_capability: of its GPU; on_this_gpu: whether that is the
    first GPU of this machine."""

    name: str
    flavour: str
    compute_capability: str
    on_this_gpu: bool = False


def profiles(name: str, graph: Graph, sizes: EngineSizes) -> tuple[dict[str, Range], ...]:
    """Optimization profiles of a graph: of the decoder one for a decode step and one for prefill."""
    if name == "vision":
        return (_ranges(graph, {"tiles": (1, min(2, sizes.tiles), sizes.tiles)}),)
    fixed = {"batch": (1, 1, 1), "capacity": (1, sizes.context, sizes.context)}
    steps = ((1, 1, 1), (1, sizes.prefill_chunk, sizes.prefill_chunk))
    return tuple(_ranges(graph, {**fixed, "tokens": tokens}) for tokens in steps)


def _ranges(graph: Graph, sides: dict[str, tuple[int, int, int]]) -> dict[str, Range]:
    """Smallest, usual and largest shape of every input with a dynamic side."""
    return {port.name: tuple(tuple(sides[side][bound] if isinstance(side, str) else side for side in port.shape)
                             for bound in range(3))
            for port in graph.inputs if any(isinstance(side, str) for side in port.shape)}  # fmt: skip


def build_engines(bundle: Path, target: EngineTarget, sizes: EngineSizes, progress: Progress) -> EngineRecord:
    """Builds the engines of a target into a bundle and records them in its manifest, which is written last.

    An engine appears under its name when it is whole; after an interruption the same call begins again. Raises
    VL2Error where a build fails.
    """
    with locked_folder(bundle, "engine build"):
        if target.name in read_manifest(bundle).engines:
            _drop(bundle, target.name)
        manifest = read_manifest(bundle)
        facts: dict[str, EngineFacts] = {}
        ranges = {name: profiles(name, graph, sizes) for name, graph in manifest.graphs.items()}
        for number, (name, graph) in enumerate(manifest.graphs.items()):
            progress(name, number, len(ranges))
            capabilities = () if target.flavour == TENSORRT else (target.compute_capability,)
            job = EngineJob(str(bundle / graph.file), str(bundle / engine_file(name, target.name)), target.flavour,
                            capabilities, ranges[name], target.on_this_gpu)  # fmt: skip
            facts[name] = build_apart(job)
        progress("done", len(ranges), len(ranges))
        record = EngineRecord(
            backend=target.flavour, version=next(iter(facts.values())).tensorrt,
            compute_capability=target.compute_capability, kernels=plugin_hash(),
            sizes=asdict(sizes), profiles={name: list(each) for name, each in ranges.items()},
            files={name: engine_file(name, target.name) for name in ranges},
            builds={name: _figures(each) for name, each in facts.items()},
        )  # fmt: skip
        write_manifest(bundle, _recorded(bundle, manifest, target.name, record))
    return record


def engine_file(graph: str, target: str) -> str:
    """The name of an engine in the bundle."""
    return f"{graph}.{target}.engine"


def _drop(bundle: Path, target: str) -> None:
    """Takes a target's engines out of the manifest and then off the disk, so that the bundle is whole at any time."""
    manifest = read_manifest(bundle)
    gone = manifest.engines[target].files.values()
    files = {name: facts for name, facts in manifest.files.items() if name not in gone}
    engines = {name: record for name, record in manifest.engines.items() if name != target}
    write_manifest(bundle, replace(manifest, files=files, engines=engines))
    for name in gone:
        (bundle / name).unlink(missing_ok=True)


def _recorded(bundle: Path, manifest: Manifest, target: str, record: EngineRecord) -> Manifest:
    files = manifest.files | {name: file_facts(bundle / name) for name in record.files.values()}
    return replace(manifest, files=files, engines={**manifest.engines, target: record})


def _figures(facts: EngineFacts) -> dict[str, int | float]:
    return {"size_bytes": facts.size_bytes, "seconds": facts.seconds, "peak_rss_bytes": facts.peak_rss_bytes}

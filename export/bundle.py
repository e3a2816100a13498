"""`export_checkpoint`: a checkpoint folder in, a bundle out."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vl2 import __version__
from vl2.checkpoint_name import checkpoint_name
from vl2.errors import VL2Error
from vl2.export.checkpoint import Checkpoint, open_checkpoint
from vl2.export.choice import ExportOptions, bundle_scheme, choose_storing, quantization_facts
from vl2.export.embeddings import FILE_NAME, embeddings_facts, embeddings_header, place_embeddings
from vl2.export.engine_graph import engine_graphs
from vl2.export.facts import (
    copied_contents,
    copied_files,
    image_facts,
    language_facts,
    module_facts,
    token_ids,
    tool_versions,
)
from vl2.export.graphs import declare_graphs, with_slots
from vl2.export.passes.store_weights import DataFile, PlacedWeight
from vl2.export.plan import plan_checkpoint
from vl2.export.resident import check_memory
from vl2.export.source_hashes import hashed_in_background
from vl2.export.staging import Staging, check_place, check_space, open_staging
from vl2.export.storing import CPU, TRT, Storing
from vl2.export.stream import write_weights
from vl2.export.to_onnx import PACKED_OPSET, build_graph, check_graph
from vl2.export.verify import verify_bundle
from vl2.manifest import (
    SCHEMA_VERSION,
    FileFacts,
    Graph,
    Manifest,
    ModuleFacts,
    Source,
    file_facts,
    write_manifest,
)
from vl2.quantization import DESCRIPTION_NAME

# stage, bytes done, bytes in all
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """One export under way."""

    checkpoint: Checkpoint
    storing: Storing
    options: ExportOptions
    staging: Staging
    progress: Progress


def export_checkpoint(
    source: Path, out: Path, options: ExportOptions | None = None, progress: Progress | None = None
) -> Manifest:
    """Writes the bundle of a checkpoint folder and returns its manifest.

    Everything is written into a folder beside `out`, which is renamed when it is whole. After an interruption the same
    call goes on behind the last finished part. Raises VL2Error on a bad checkpoint, an existing `out`, a full disk.
    """
    options, source, out = options or ExportOptions(), Path(source), Path(out).absolute()
    check_place(out, options.force)
    checkpoint = open_checkpoint(source)
    storing = choose_storing(checkpoint, options)
    plan = plan_checkpoint(checkpoint, storing)
    if options.verify:
        check_memory(plan.verify_memory_bytes)
    with open_staging(out) as staging, hashed_in_background(_source_files(checkpoint)) as hashes:
        job = Job(checkpoint, storing, options, staging, progress or _silent)
        inputs = _inputs(job)
        staging.resume(inputs)
        check_space(staging, plan.bundle_bytes)
        manifest = _write_bundle(job, hashes)
        if _inputs(job) != inputs:
            raise VL2Error(f"files of {source} changed while they were exported", "export again when they are whole")
        staging.publish()
    return manifest


def _write_bundle(job: Job, hashes: Future) -> Manifest:
    staging, checkpoint = job.staging, job.checkpoint
    declared = _declared(job)
    parts = {name: staging.part(name) or _write_graph(job, name) for name in declared}
    parts["embeddings"] = staging.part("embeddings") or _write_embeddings(job)
    parts["copies"] = _copy_files(job)
    placed = place_embeddings(checkpoint, job.storing)
    manifest = Manifest(
        vl2_version=__version__,
        variant=checkpoint.config.variant,
        scheme=bundle_scheme(checkpoint, job.storing),
        source=job.options.source or Source(checkpoint_name(checkpoint.folder), hashes.result()),
        image=image_facts(checkpoint),
        language=language_facts(checkpoint.config),
        tokens=token_ids(checkpoint),
        graphs=declared,
        embeddings=embeddings_facts(placed),
        files={name: FileFacts(**facts) for part in parts.values() for name, facts in part["files"].items()},
        modules=_sum_modules(parts.values()),
        tools=tool_versions(PACKED_OPSET) if checkpoint.quantized and not _is_engine(job) else tool_versions(),
        conversion={"underflow": _merged(part.get("underflow", {}) for part in parts.values())},
        verify={"status": "skipped"},
        schema_version=SCHEMA_VERSION if declared["decoder"].slots else 1,
        lowering=job.storing.lowering,
        mode=job.storing.mode,
        quantization=quantization_facts(checkpoint),
    )
    write_manifest(staging.folder, manifest)
    if job.options.verify:
        manifest = verify_bundle(staging.folder, manifest, checkpoint, job.progress)
        write_manifest(staging.folder, manifest)
    return manifest


def _declared(job: Job) -> dict[str, Graph]:
    graphs = declare_graphs(job.checkpoint.config, job.storing.kv_cache)
    if job.storing.lowering == CPU:
        return with_slots(graphs)
    return engine_graphs(graphs) if _is_engine(job) else graphs


def _is_engine(job: Job) -> bool:
    return job.storing.lowering == TRT


def _write_graph(job: Job, name: str) -> dict[str, Any]:
    graph = _declared(job)[name]
    data = DataFile(graph.data_file, job.storing)
    job.progress(f"{name} graph", 0, 1)
    model, placed = build_graph(name, job.checkpoint.config, data)
    job.progress(f"{name} graph", 1, 1)
    record = _write_weights(job, name, graph.data_file, placed)
    path = job.staging.folder / graph.file
    ir.save(model, path)
    check_graph(path, graph, placed)
    files = {graph.file: asdict(file_facts(path)), **record.pop("files")}
    return job.staging.finish(name, files, record)


def _write_embeddings(job: Job) -> dict[str, Any]:
    placed = place_embeddings(job.checkpoint, job.storing)
    record = _write_weights(job, "embeddings", FILE_NAME, placed)
    return job.staging.finish("embeddings", record.pop("files"), record)


def _write_weights(job: Job, stage: str, file: str, placed: list[PlacedWeight]) -> dict[str, Any]:
    total, done = sum(place.size_bytes for place in placed), 0

    def report(block_bytes: int) -> None:
        nonlocal done
        done += block_bytes
        job.progress(f"{stage} weights", done, total)

    header = embeddings_header(placed) if file.endswith(".safetensors") else b""
    written = write_weights(job.staging.folder / file, header, placed, job.checkpoint, report)
    modules = {name: asdict(facts) for name, facts in module_facts(placed, job.checkpoint).items()}
    return {"files": {file: asdict(written.facts)}, "underflow": written.underflow, "modules": modules}


def _copy_files(job: Job) -> dict[str, Any]:
    files = {}
    for name, content in copied_contents(job.checkpoint.folder).items():
        copy = job.staging.folder / name
        copy.write_bytes(content)
        files[name] = asdict(file_facts(copy))
    return {"files": files}


def _inputs(job: Job) -> dict[str, Any]:
    """Everything that the graphs' files depend on."""
    files = _source_files(job.checkpoint)
    status = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    return {
        "folder": str(job.checkpoint.folder.resolve()),
        "files": status,
        "scheme": job.storing.scheme,
        "lowering": job.storing.lowering,
        "kv_cache": job.storing.kv_cache,
        "mode": job.storing.mode,
        "vl2_version": __version__,
        "tools": tool_versions(),
    }


def _source_files(checkpoint: Checkpoint) -> list[Path]:
    description = checkpoint.folder / DESCRIPTION_NAME
    described = [description] if checkpoint.quantized and description.is_file() else []
    return [*checkpoint.weight_files, *copied_files(checkpoint.folder), *described]


def _sum_modules(parts) -> dict[str, ModuleFacts]:
    sums: dict[str, ModuleFacts] = {}
    for part in parts:
        for name, facts in part.get("modules", {}).items():
            old = sums.get(name, ModuleFacts(0, 0))
            sums[name] = ModuleFacts(
                old.parameters + facts["parameters"], old.size_bytes + facts["size_bytes"]
            )
    return sums


def _merged(counts) -> dict[str, int]:
    return {tensor: count for part in counts for tensor, count in part.items()}


def _silent(stage: str, done_bytes: int, total_bytes: int) -> None:
    """No one looks."""

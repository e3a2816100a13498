"""Traces of the exporter, shared by parallel workers: a kind of piece is traced by the first that needs it.

A trace costs one to four seconds of a core, and the suite exports the same few models in many files.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import onnx_ir as ir

from vl2.export import assemble

_WEIGHTS = "weights"  # of the file's metadata: inputs that stand for initializers without data


def share_traces(folder: Path) -> None:
    """Puts a cache of files under the exporter's own one, for this process. folder: of all workers."""
    trace = assemble._traced.__wrapped__
    folder.mkdir(exist_ok=True)
    assemble._traced = lru_cache(maxsize=None)(lambda kind: _traced_once(trace, kind, folder))


def _traced_once(trace: Callable[[assemble._Kind], ir.Graph], kind: assemble._Kind, folder: Path) -> ir.Graph:
    facts = repr((kind.name, kind.settings, kind.inputs, kind.outputs, kind.native))
    file = folder / f"{hashlib.sha256(facts.encode()).hexdigest()}.onnx"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():
            return read_trace(file)
        graph = trace(kind)
        write_trace(graph, file)
    return graph


def write_trace(graph: ir.Graph, file: Path) -> None:
    """Initializers without data cannot be stored, so they are written as inputs behind the others."""
    copy = graph.clone()
    weights = [name for name, value in copy.initializers.items() if value.const_value is None]
    copy.inputs.extend(copy.initializers.pop(name) for name in weights)
    model = ir.Model(copy, ir_version=10)
    model.metadata_props[_WEIGHTS] = "\n".join(weights)
    whole = file.with_suffix(".part")
    ir.save(model, whole)
    whole.rename(file)


def read_trace(file: Path) -> ir.Graph:
    model = ir.load(file)
    graph, weights = model.graph, set(model.metadata_props[_WEIGHTS].split("\n"))
    held = [value for value in graph.inputs if value.name in weights]
    for value in held:
        graph.inputs.remove(value)
        graph.initializers.add(value)
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.op_type == "Constant" and "value" in node.attributes:
            # the tracer's own link, by which the tensor takes part in renaming
            (output,), tensor = node.outputs, node.attributes["value"].as_tensor()
            output.const_value, tensor.name = tensor, output.name
    return graph

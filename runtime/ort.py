"""The onnxruntime backend: memory-mapped weights, inputs read where they lie."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vl2.errors import VL2Error
from vl2.manifest import Graph, Manifest
from vl2.mapped_pages import bounded_file_pages, drop_file_pages
from vl2.operators import register_operators
from vl2.runtime.backend import Arrays, Backend
from vl2.runtime.cores import physical_cores
from vl2.runtime.options import BundleOptions
from vl2.runtime.providers import CPU, CUDA, Choice, choose, installed_packages

_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool", "tensor(float16)": "float16",
           "tensor(int8)": "int8"}
# Measured on a float16 bundle of 1.3 GB: 45 MB of own memory after loading, 2.8 GB with onnxruntime's defaults.
_CONFIG = {
    # Folding would widen every float16 weight for good instead of at its use.
    "optimization.disable_specified_optimizers": "ConstantFolding",
    # Threads spin for speed while a graph runs and rest as soon as it is done.
    "session.force_spinning_stop": "1",
}
# By lowering. A packed copy of float weights would take their size again, on top of the map. MatMulNBits is fast with
# packed copies only (0.2 against 9 ms for 1280 × 896).
_PREPACKING_KEY = "session.disable_prepacking"
_DISABLE_PREPACKING = {"portable": "1", "ort": "0", "cpu": "1"}
# Mapped pages that may be resident while a session packs them.
_UNPACKED_LIMIT_BYTES = 128 << 20
_ERRORS_ONLY = 3
# What to ask `choose` for, by the backend that was asked for.
_DEVICES = {"auto": "auto", "ort-cuda": "cuda", "ort-cpu": "cpu"}


class OrtBackend(Backend):
    """Runs a bundle's graphs with onnxruntime; each is loaded on its first run. note: why nothing faster was taken.

    description: the processor, its threads and the version, in one line.
    """

    def __init__(self, folder: Path, manifest: Manifest, options: BundleOptions, note: str = ""):
        import onnxruntime

        self._ort, self._folder, self._graphs = onnxruntime, folder, manifest.graphs
        if manifest.lowering not in _DISABLE_PREPACKING:
            raise VL2Error(f"{folder} has the lowering {manifest.lowering!r}, this vl2 runs "
                           f"{', '.join(_DISABLE_PREPACKING)}", "update vl2-edge, or export the bundle again")
        self._lowering = manifest.lowering
        self._config = _CONFIG | {_PREPACKING_KEY: _DISABLE_PREPACKING[manifest.lowering]}
        self._device, self._note = _DEVICES[options.wanted], note
        self._threads = options.threads or physical_cores()
        if manifest.lowering == "cpu" and self._device == "cuda":
            raise VL2Error(f"CUDA was asked for, and {folder} has the lowering `cpu`, whose operators run on CPUs only",
                           "give --backend ort-cpu, or export the bundle with --lowering ort (fp16: portable)")
        device, offered = "cpu" if manifest.lowering == "cpu" else self._device, onnxruntime.get_available_providers()
        self._choice = choose(device, offered, installed_packages())
        if manifest.lowering == "cpu" and self._device == "auto" and CUDA in offered:
            self._choice = Choice((CPU,), "not CUDA: the bundle has the lowering cpu")
        if CUDA in self._choice.providers and hasattr(onnxruntime, "preload_dlls"):
            # It prints what it misses; standard output belongs to results.
            with contextlib.redirect_stdout(sys.stderr):
                onnxruntime.preload_dlls()
        self._sessions: dict[str, Any] = {}

    @property
    def description(self) -> str:
        """Where graphs run; where CUDA is offered it loads the decoder, which alone tells whether CUDA works."""
        if CUDA in self._choice.providers:
            self.load("decoder")
        name = f"onnxruntime {self._ort.__version__}"
        notes = "; ".join(filter(None, (self._note, self._choice.note)))
        note = f" ({notes})" if notes else ""
        if CUDA in self._choice.providers:
            return f"CUDA, {name}{note}"
        return f"CPU, {self._threads} thread{'s' * (self._threads != 1)}, {name}{note}"

    def load(self, graph: str) -> None:
        """As Backend.load."""
        self._session(graph)

    def run(self, graph: str, feeds: Arrays, results: Arrays) -> None:
        """As Backend.run. Inputs are read in place; outputs are copied: with 24 cache tensors, binding each to its
        place took twice as long as running and copying."""
        session = self._session(graph)
        try:
            outputs = session.run(list(results), dict(feeds))
        except Exception as error:  # as in _load
            raise VL2Error(f"onnxruntime failed in the graph {graph}: {error}",
                           "if it is memory, end other programs or give a smaller prefill chunk") from error
        for result, output in zip(results.values(), outputs, strict=True):
            result[...] = output

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            self._sessions[name] = self._load(self._graphs[name])
        return self._sessions[name]

    def _load(self, graph: Graph) -> Any:
        path = self._folder / graph.file
        ort, options = self._ort, self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        options.enable_mem_pattern = False
        # The highest level folds constants whatever is disabled; the default order widens all weights before the first
        # is used.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        for key, value in self._config.items():
            options.add_session_config_entry(key, value)
        if self._lowering == "cpu":
            register_operators(options, self._folder)
        try:
            with self._given_back():
                session = ort.InferenceSession(str(path), options, providers=list(self._choice.providers))
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise VL2Error(f"onnxruntime {ort.__version__} cannot load {path}: {error}",
                           "update onnxruntime, or export the bundle again") from error
        self._check_device(session)
        _check_ports(session.get_inputs(), graph.inputs, path)
        _check_ports(session.get_outputs(), graph.outputs, path)
        return session

    @contextlib.contextmanager
    def _given_back(self) -> Iterator[None]:
        """Drops pages of the map that a session has packed: it keeps the map and reads the packed copy from then on."""
        if self._config[_PREPACKING_KEY] == "1":
            yield
            return
        with bounded_file_pages(self._folder, _UNPACKED_LIMIT_BYTES):
            yield
        drop_file_pages(self._folder)

    def _check_device(self, session: Any) -> None:
        """onnxruntime goes over to the CPU where the CUDA libraries do not load; that must not go unsaid."""
        if CUDA in self._choice.providers and session.get_providers()[0] == CPU:
            reason = "onnxruntime-gpu found no working CUDA and cuDNN libraries"
            if self._device == "cuda":
                raise VL2Error(f"CUDA was asked for, but {reason}", "pip install 'onnxruntime-gpu[cuda,cudnn]'")
            self._choice = Choice((CPU,), f"not CUDA: {reason}")


def _check_ports(found: list, expected: tuple, path: Path) -> None:
    got = {port.name: (_DTYPES.get(port.type, port.type), len(port.shape)) for port in found}
    want = {port.name: (port.dtype, len(port.shape)) for port in expected}
    if got != want:
        names = sorted(name for name in got.keys() | want.keys() if got.get(name) != want.get(name))
        raise VL2Error(f"{path}: {names[0]} is {got.get(names[0])} in the graph, {want.get(names[0])} in the manifest",
                       "graph and manifest belong to different exports; export the bundle again")

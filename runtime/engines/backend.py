"""The backend of engines: TensorRT or TensorRT-RTX with our plugins, caches and weights on the device."""

from __future__ import annotations

from pathlib import Path

from vl2.engine_record import written_name
from vl2.errors import VL2Error
from vl2.manifest import Manifest
from vl2.runtime.backend import Arrays, Backend, Limits
from vl2.runtime.engines.contexts import kernels_file
from vl2.runtime.engines.find import FoundEngines
from vl2.runtime.engines.library import Library
from vl2.runtime.engines.memory import DeviceMemory, DeviceWeights
from vl2.runtime.engines.session import EngineSession, Opened
from vl2.runtime.options import BundleOptions

_NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
# Of the decoder's profiles (vl2.plugins.tensorrt.engines).
_DECODE, _PREFILL = 0, 1
_SIZES = {"context", "prefill_chunk", "tiles"}


class EngineBackend(Backend):
    """Runs a bundle's graphs by their engines; each is loaded on its first run."""

    def __init__(self, folder: Path, manifest: Manifest, found: FoundEngines, options: BundleOptions):
        self._folder, self._manifest, self._found = folder, manifest, found
        self._check_record()
        sizes = found.record.sizes
        self.limits = Limits(sizes["context"], sizes["prefill_chunk"], sizes["tiles"])
        self.cache_memory = DeviceMemory(found.device)
        self._replay, self._check_memory = options.cuda_graph, options.check_memory
        names = (manifest.graphs["decoder"].data_file, *found.record.files.values())
        self._require_memory(f"loading the engines and weights of {folder}",
                             sum(manifest.files[name].size_bytes for name in names))
        self._library = Library(found.trt, found.device)
        self._sessions: dict[str, EngineSession] = {}

    @property
    def description(self) -> str:
        """As Backend.description."""
        found, record = self._found, self._found.record
        steps = "decode steps as CUDA graphs" if self._replay else "no CUDA graphs"
        note = f" ({found.note})" if found.note else ""
        return (f"{_NAMES[record.backend]} {record.version}, engines for {found.target} on {found.device.name} "
                f"(compute capability {record.compute_capability}), {steps}{note}")

    def load(self, graph: str) -> None:
        """As Backend.load: deserializes the engine, and for the decoder copies the weights to the device."""
        self._session(graph)

    def run(self, graph: str, feeds: Arrays, results: Arrays) -> None:
        """As Backend.run; a step of one token is a decode step, and replayed."""
        session = self._session(graph)
        if graph != "decoder":
            session.run(feeds, results)
            return
        one = feeds["inputs_embeds"].shape[1] == 1
        session.run(feeds, results, _DECODE if one else _PREFILL, replay=one and self._replay)

    def _session(self, graph: str) -> EngineSession:
        with self._found.device.lock:
            if graph not in self._sessions:
                opened = self._opened(graph)
                self._sessions[graph] = EngineSession(self._library, opened, *self._inputs(graph))
            return self._sessions[graph]

    def _opened(self, graph: str) -> Opened:
        """Loads an engine, which alone knows its scratch memory. Raises VL2Error where that or weights have no room."""
        name, facts = self._found.record.files[graph], self._manifest.graphs[graph]
        engine = self._library.engine(self._folder / name)
        weights = self._manifest.files[facts.data_file].size_bytes if graph == "decoder" else 0
        scratch = engine.device_memory_size_v2
        self._require_memory(f"running {name} with {scratch / 1e9:.2f} GB of scratch memory", weights + scratch)
        kernels = kernels_file(self._manifest.files[name].sha256, self._found.device.name)
        return Opened(self._folder / name, engine, kernels)

    def _inputs(self, graph: str) -> tuple[dict[str, int], dict[str, str]]:
        """Addresses of the weights that are inputs, and which outputs are caches written in place."""
        facts = self._manifest.graphs[graph]
        if graph != "decoder":
            return {}, {}
        self._weights = DeviceWeights(self._found.device, self._folder / facts.data_file)
        return self._weights.addresses, {written_name(pair.past): pair.past for pair in facts.cache}

    def _check_record(self) -> None:
        """Raises VL2Error for a record of engines that is not whole."""
        record, target = self._found.record, self._found.target
        missing = sorted((_SIZES - record.sizes.keys()) | (self._manifest.graphs.keys() - record.files.keys()))
        if missing:
            raise VL2Error(f"the manifest of {self._folder} says nothing of `{missing[0]}` for the engines of {target}",
                           f"build them again: `vl2 engine {self._folder} --target {target} --force`")

    def _require_memory(self, what: str, needed: int) -> None:
        """Raises VL2Error when that is more than the device has free."""
        if self._check_memory and needed > (free := self._found.device.free_bytes()):
            raise VL2Error(
                f"{what} needs {needed / 1e9:.2f} GB of the GPU's memory, {free / 1e9:.2f} GB are free",
                "end other programs, use a bundle of a smaller scheme or model, build engines for a shorter "
                "--prefill-chunk and fewer --tiles, or open it with --no-memory-check "
                "(BundleOptions(check_memory=False))",
            )

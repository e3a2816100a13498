"""Execution contexts of one engine, and what TensorRT-RTX compiles for them, kept from one process to the next."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from vl2.plugins.cuda.pack import cache_folder

log = logging.getLogger("vl2.runtime")


def kernels_file(engine_sha256: str, gpu: str) -> Path:
    """Where what was compiled for an engine on a GPU is kept: `vl2/engines` in the user's cache folder."""
    name = hashlib.sha256(f"{engine_sha256} {gpu}".encode()).hexdigest()
    return cache_folder().with_name("engines") / f"{name[:32]}.kernels"


class Contexts:
    """Makes contexts whose memory the caller gives. TensorRT compiled its kernels when the engine was built;
    TensorRT-RTX does while it runs, which `kernels` spares a second process."""

    def __init__(self, trt: Any, engine: Any, kernels: Path):
        self._engine, self._memory = engine, trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._configs: tuple[Any, ...] = ()
        self._kept: KeptKernels | None = None
        when = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        if when is not None and hasattr(engine, "create_runtime_config"):
            # a captured graph keeps the kernels of its first run for good; other runs need not wait for better ones
            self._configs = tuple(self._config(strategy) for strategy in (when.LAZY, when.EAGER))
            compiled = self._configs[0].create_runtime_cache()
            self._kept = KeptKernels(compiled, kernels)
            for config in self._configs:
                config.set_runtime_cache(compiled)

    def new(self, captured: bool) -> Any:
        """A context, None where TensorRT refuses; captured: whether its runs become CUDA graphs."""
        return self._engine.create_execution_context(self._configs[captured] if self._configs else self._memory)

    def keep(self) -> None:
        """Writes down what was compiled until now; it is worth it when a context has run for the first time."""
        if self._kept is not None:
            self._kept.write()

    def _config(self, strategy: Any) -> Any:
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._memory)
        config.dynamic_shapes_kernel_specialization_strategy = strategy
        return config


class KeptKernels:
    """A runtime cache of TensorRT-RTX and its file. compiled: the cache, filled from the file where that fits; one of
    another GPU, driver or version, or a broken one, is dropped."""

    def __init__(self, compiled: Any, path: Path):
        self._compiled, self._path, self._written = compiled, path, b""
        try:
            found = path.read_bytes()
        except OSError:
            return
        if compiled.deserialize(found):
            self._written = hashlib.sha256(found).digest()
            return
        log.info("%s does not fit this machine and is made again", path)
        self._attempt(path.unlink)

    def write(self) -> None:
        """Beside and renamed into place, where there is anything new. What cannot be written is compiled again."""
        content = self._compiled.serialize()
        if content is None:
            return
        held = bytes(memoryview(content))
        digest = hashlib.sha256(held).digest()
        if held and digest != self._written:
            self._written = digest
            self._attempt(lambda: _replace(self._path, held))

    def _attempt(self, work: Any) -> None:
        try:
            work()
        except OSError as error:
            log.warning("compiled kernels are not kept in %s: %s", self._path, error)


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder, path.name)
        unfinished.write_bytes(content)
        os.replace(unfinished, path)

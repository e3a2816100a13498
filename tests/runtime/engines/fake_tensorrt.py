"""Stands for the module `tensorrt_rtx`: an "engine" is JSON that names an ONNX graph of the lowering `trt` and its
profiles. A run emulates the graph on what lies at the addresses that were bound, wherever the runtime has put it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx

from tests.runtime.engines.fake_cuda import FakeDriver
from vl2.engine_record import written_name
from vl2.export.engine_emulation import EmulatedSession

VERSION = "1.7.1.116"


class ILogger:
    """As TensorRT's."""

    ERROR, WARNING = 1, 2


def fake_tensorrt(driver: FakeDriver) -> Any:
    """The module; contexts: all execution contexts that were made; capturable: what they say of themselves."""
    module = SimpleNamespace(
        __name__="tensorrt_rtx", __version__=VERSION, ILogger=ILogger, contexts=[], fail=False,
        capturable=True, DynamicShapesKernelSpecializationStrategy=SimpleNamespace(LAZY="lazy", EAGER="eager"),
        TensorLocation=SimpleNamespace(DEVICE="device"), TensorIOMode=SimpleNamespace(INPUT="input"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
        # as if other plugins of this process were registered already
        get_plugin_registry=lambda: SimpleNamespace(get_creator=lambda *names: "a creator"),
    )  # fmt: skip
    module.Runtime = lambda logger: _Runtime(module, driver, logger)
    return module


class _Runtime:
    def __init__(self, module: Any, driver: FakeDriver, logger: Any):
        self._module, self._driver, self._logger = module, driver, logger

    def deserialize_cuda_engine(self, content: np.ndarray) -> Engine | None:
        try:
            facts = json.loads(content.tobytes())
        except ValueError:
            self._logger.log(ILogger.ERROR, "the magic tag does not match")
            return None
        return Engine(facts, self._module, self._driver, self._logger)


@cache
def _emulated(path: Path) -> tuple[onnx.GraphProto, EmulatedSession]:
    return onnx.load(path, load_external_data=False).graph, EmulatedSession(path)


class Engine:
    device_memory_size_v2 = 1000

    def __init__(self, facts: dict[str, Any], module: Any, driver: FakeDriver, logger: Any):
        graph, self.session = _emulated(Path(facts["graph"]))
        self.profiles, self.module, self.driver, self.logger = facts["profiles"], module, driver, logger
        self.tensors = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
        self.outputs = [value.name for value in graph.output]
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, number: int) -> str:
        return list(self.tensors)[number]

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def get_tensor_mode(self, name: str) -> str:
        return "output" if name in self.outputs else "input"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if side.dim_param else side.dim_value for side in self.tensors[name].shape.dim)

    def dtype(self, name: str) -> np.dtype:
        return onnx.helper.tensor_dtype_to_np_dtype(self.tensors[name].elem_type)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, given: RuntimeConfig | str) -> Context:
        config = RuntimeConfig(given, "none") if isinstance(given, str) else given
        assert config.memory == "user", "one scratch block serves all contexts"
        self.module.contexts.append(Context(self, config))
        return self.module.contexts[-1]


@dataclass
class RuntimeConfig:
    """As IRuntimeConfig; memory, dynamic_shapes_kernel_specialization_strategy, kernels: what was set."""

    memory: str = "static"
    dynamic_shapes_kernel_specialization_strategy: str = "lazy"
    kernels: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.memory = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, kernels: RuntimeCache) -> bool:
        self.kernels = kernels
        return True


class RuntimeCache:
    """Says only how often a kernel was compiled, by strategy."""

    def __init__(self):
        self.compiled: dict[str, int] = {}

    def deserialize(self, blob: bytes) -> bool:
        try:
            self.compiled = json.loads(blob)
        except ValueError:
            return False
        return True

    def serialize(self) -> bytes:
        return json.dumps(self.compiled).encode()


class Context:
    def __init__(self, engine: Engine, config: RuntimeConfig):
        self.engine, self.driver, self.config = engine, engine.driver, config
        self.shapes, self.addresses, self.ranges, self.changes = {}, {}, {}, 0

    def set_device_memory(self, address: int, size: int) -> None:
        self.driver.array(address, (size,), "u1")
        assert size >= self.engine.device_memory_size_v2

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.ranges, self.changes = self.engine.profiles[profile], self.changes + 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert -1 in self.engine.get_tensor_shape(name), f"{name} has a fixed shape"
        least, _, most = self.ranges[name]
        if not all(low <= side <= high for low, side, high in zip(least, shape, most, strict=True)):
            self.engine.logger.log(ILogger.ERROR, f"{name} {shape} is outside {least} to {most}")
            return False
        self.shapes[name], self.changes = tuple(shape), self.changes + 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, f"{name} lies at {address:#x}"
        self.addresses[name], self.changes = address, self.changes + 1
        return name in self.engine.tensors

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.module.capturable

    def execute_async_v3(self, stream: int) -> bool:
        if self.config.kernels is not None:
            when, compiled = self.config.dynamic_shapes_kernel_specialization_strategy, self.config.kernels.compiled
            compiled[when] = max(1, compiled.get(when, 0))
        if self.engine.module.fail:
            self.engine.logger.log(ILogger.ERROR, "an illegal memory access was encountered")
            return False
        missing = self.engine.tensors.keys() - self.addresses.keys()
        assert not missing, f"not bound: {missing}"
        changes = self.changes
        self.driver.enqueue(lambda: self._run(changes))
        return True

    def _run(self, changes: int) -> None:
        assert self.changes == changes, "a captured graph holds only as long as its context is not changed"
        engine = self.engine
        feeds = {name: self._array(name) for name in engine.tensors if name not in engine.outputs}
        caches = {written_name(name): array for name, array in feeds.items()}
        for name, result in zip(engine.outputs, engine.session.run(None, feeds), strict=True):
            if name in caches:
                assert self.addresses[name] == caches[name].ctypes.data, f"{name} is not written in place"
                assert np.shares_memory(result, caches[name])
            else:
                self.driver.array(self.addresses[name], result.shape, engine.dtype(name))[...] = result

    def _array(self, name: str) -> np.ndarray:
        shape = self.shapes.get(name, self.engine.get_tensor_shape(name))
        assert -1 not in shape, f"{name} has no shape yet"
        return self.driver.array(self.addresses[name], shape, self.engine.dtype(name))

"""One engine on a device: its buffers, an execution context for each way it is run, and graphs of decode steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vl2.errors import VL2Error
from vl2.runtime.backend import Arrays
from vl2.runtime.engines.contexts import Contexts
from vl2.runtime.engines.library import Library
from vl2.runtime.engines.memory import DeviceArray

# Of so many sets of caches a decode step is kept as a graph, each with an execution context of its own.
_KEPT_STEPS = 8


@dataclass(frozen=True)
class Place:
    """Where a tensor of one run lies on the device."""

    shape: tuple[int, ...]
    address: int


@dataclass(frozen=True)
class Opened:
    """An engine as TensorRT has loaded it from a file; kernels: the file of what is compiled for it."""

    path: Path
    engine: Any
    kernels: Path


@dataclass
class Step:
    """A decode step over one set of caches: TensorRT's graph holds as long as its context is not changed."""

    context: Any
    graph: Any = None


class EngineSession:
    """Runs one engine. weights: addresses of inputs that never change; aliased: outputs that are inputs, by name.

    An input of the host is copied into a buffer of its own a profile. Everything happens on the device's one stream.
    """

    def __init__(self, library: Library, opened: Opened, weights: Mapping[str, int], aliased: Mapping[str, str]):
        self._library, self._device, self._path = library, library.device, opened.path
        self._weights, self._aliased = weights, aliased
        self._engine = opened.engine
        self._check_places()
        self._maker, self._made = Contexts(library.trt, opened.engine, opened.kernels), False
        # one for all contexts: they never run at the same time
        self._scratch = DeviceArray(self._device, (max(1, self._engine.device_memory_size_v2),), np.uint8)
        self._buffers: dict[tuple[int, str], DeviceArray] = {}
        self._contexts: dict[int, Any] = {}
        self._steps: OrderedDict[tuple, Step] = OrderedDict()

    def run(self, feeds: Arrays, results: Arrays, profile: int = 0, replay: bool = False) -> None:
        """Runs it once. feeds: NumPy arrays, or DeviceArrays that are read and written where they are; replay: as a
        CUDA graph, captured when a run is the second one on the same device arrays.

        Raises VL2Error with TensorRT's words where a run fails, and where it cannot be captured.
        """
        device = self._device
        with device.lock:
            device.activate()
            try:
                self._run(feeds, results, profile, replay)
            except BaseException:
                # copies that are under way read feeds and write results, which the caller may let go of now
                with suppress(VL2Error):
                    device.synchronize()
                raise
            if self._made:
                self._made = False
                self._maker.keep()

    def _run(self, feeds: Arrays, results: Arrays, profile: int, replay: bool) -> None:
        device = self._device
        places = {name: self._placed(profile, name, value) for name, value in feeds.items()}
        places |= {name: Place(value.shape, self._buffer(profile, name, value.nbytes).address)
                   for name, value in results.items()}  # fmt: skip
        places |= {output: places[source] for output, source in self._aliased.items()}
        if replay:
            self._replay(profile, places)
        else:
            context = self._context(profile)
            self._bind(context, places)
            self._enqueue(context)
        for name, value in results.items():
            device.get(value, places[name].address)
        device.synchronize()

    def _replay(self, profile: int, places: dict[str, Place]) -> None:
        """The first run on a set of addresses and shapes is TensorRT's own, which it needs before one is captured."""
        key = (profile, *places.items())
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = Step(self._new_context(profile, captured=True))
            self._bind(step.context, places)
            self._enqueue(step.context)
            if len(self._steps) > _KEPT_STEPS:
                self._forget(next(iter(self._steps)))
            return
        self._steps.move_to_end(key)
        if step.graph is None:
            step.graph = self._capture(step.context)
        self._device.launch(step.graph)

    def _capture(self, context: Any) -> Any:
        try:
            capturable = getattr(context, "is_stream_capturable", None)
            if capturable is not None and not capturable(self._device.stream):
                raise VL2Error(f"{self._library.trt.__name__} says that it has operations which a graph cannot hold")
            return self._device.capture(lambda: self._enqueue(context))
        except VL2Error as error:
            raise VL2Error(f"a decode step of {self._path.name} cannot be captured as a CUDA graph: {error.message}",
                           "--no-cuda-graph (BundleOptions(cuda_graph=False)) launches its kernels one by one, which "
                           "is slower") from error

    def _forget(self, key: tuple) -> None:
        step = self._steps.pop(key)
        if step.graph is not None:
            self._device.drop(step.graph)

    def _placed(self, profile: int, name: str, value: Any) -> Place:
        if isinstance(value, DeviceArray):
            return Place(value.shape, value.address)
        buffer = self._buffer(profile, name, value.nbytes)
        self._device.put(buffer.address, value)
        return Place(value.shape, buffer.address)

    def _buffer(self, profile: int, name: str, size: int) -> DeviceArray:
        """It grows with its tensor; a decode step's, of one size always, stays where graphs expect it."""
        held = self._buffers.get((profile, name))
        if held is None or held.nbytes < size:
            held = self._buffers[profile, name] = DeviceArray(self._device, (max(1, size),), np.uint8)
        return held

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        return self._contexts[profile]

    def _new_context(self, profile: int, captured: bool = False) -> Any:
        expect = self._library.expect
        context, self._made = self._maker.new(captured), True
        expect(context is not None, f"an execution context of {self._path.name}")
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        expect(context.set_optimization_profile_async(profile, self._device.stream), f"taking profile {profile}")
        for name, address in self._weights.items():
            expect(context.set_tensor_address(name, address), f"binding the weight {name}")
        return context

    def _bind(self, context: Any, places: dict[str, Place]) -> None:
        expect = self._library.expect
        for name, place in places.items():
            if name in self._dynamic:
                expect(context.set_input_shape(name, place.shape), f"the shape {list(place.shape)} of {name}")
            expect(context.set_tensor_address(name, place.address), f"binding {name}")

    def _enqueue(self, context: Any) -> None:
        self._library.expect(context.execute_async_v3(self._device.stream), f"running {self._path.name}")

    def _check_places(self) -> None:
        """Raises VL2Error for a tensor that TensorRT wants on the host: everything is bound on the device."""
        engine, trt = self._engine, self._library.trt
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        for name in names:
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise VL2Error(f"{self._path} wants {name} in the host's memory, expected the device's",
                               "this is a defect of vl2: report it with the versions that `vl2 doctor` prints")
        missing = self._weights.keys() - names
        if missing:
            raise VL2Error(f"{self._path} has no input {min(missing)}, which is among the bundle's weights",
                           "the engine is of another export: build it again with `vl2 engine BUNDLE --force`")
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._dynamic = {name for name in inputs if -1 in tuple(engine.get_tensor_shape(name))}

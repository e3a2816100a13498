"""The C++ host as TensorRT runs it: plugins made of serialized fields launch what the Python host launches.

host_driver.cpp stands for TensorRT and fake_libcuda.c for the driver; kernels run in the emulation.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.plugins.cuda.experts_layer import BASE, LAYERS, random_layer, stored
from tests.plugins.cuda.test_attention_kernels import HEADS, LATENT, tables
from tests.plugins.cuda.weights import half, random_weight, relative_error
from tests.plugins.tensorrt.played_host import STREAM, TYPES, PlayedHost, expected_launches, read_parameters
from tests.plugins.tensorrt.test_operators import CASES, EXPERTS
from tests.tolerances import CUDA_PRODUCT, CUDA_TENSOR_PRODUCT
from vl2.plugins.cuda.launch import workspace_offsets
from vl2.plugins.cuda.storage import Storage
from vl2.plugins.tensorrt import launcher
from vl2.plugins.tensorrt.operators import OPERATORS
from vl2.plugins.tensorrt.sources import plugin_hash

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on this machine")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> PlayedHost:
    return PlayedHost(tmp_path_factory.mktemp("host"))


def float32(attributes: dict) -> dict:
    """As an engine keeps them."""
    return {name: float(np.float32(value)) if isinstance(value, float) else value for name, value in attributes.items()}


def emulated(emulator, host: PlayedHost) -> list[tuple]:
    """Lets the host's launches run in the emulation; gives what was launched."""
    seen = []

    def launched(kernel: bytes, sizes, allowed: int, stream: int, parameters: int) -> int:
        numbers = tuple(sizes[:7])
        seen.append((kernel.decode(), numbers))
        assert stream == STREAM and allowed >= numbers[6]
        three = [(ctypes.c_uint * 3)(*numbers[place:place + 3]) for place in (0, 3)]
        wrong = emulator.library.emulate(kernel, *three, numbers[6], ctypes.c_void_p(parameters), 0)
        return 0 if wrong is None else 700

    host.on_launch(launched)
    return seen


def guarded_run(emulator, host: PlayedHost, case: tuple[str, dict], arrays: dict[str, np.ndarray]) -> None:
    """One run of a plugin; its launches have to be those of Python's plan."""
    operator, attributes = case
    seen = emulated(emulator, host)
    plugin = host.plugin(operator, attributes)
    assert plugin and host.enqueue(plugin, operator, attributes, arrays) == 0
    host.driver.forget(ctypes.c_void_p(plugin))
    shapes = {tensor.name: arrays[tensor.name].shape for tensor in OPERATORS[operator].inputs(attributes)}
    assert seen == expected_launches(OPERATORS[operator].plan(attributes, shapes))


def experts_attributes(problem) -> dict:
    """The node of a layer of the kernels' tests."""
    routing = problem.routing
    given = {name: getattr(routing, name) for name in ("experts", "top_k", "topk_method", "scoring_func", "n_group",
                                                       "topk_group", "routed_scaling_factor")}  # fmt: skip
    given["norm_topk_prob"] = int(routing.norm_topk_prob)
    given |= {name: getattr(problem, name) for name in ("hidden_size", "inner_size", "shared_size")}
    storages = {"": problem.gate_up, "down_": problem.down, "shared_": problem.shared_gate_up,
                "shared_down_": problem.shared_down}  # fmt: skip
    for prefix, storage in storages.items():
        given |= {f"{prefix}scheme": storage.scheme, f"{prefix}group_size": storage.group_size}
    return {name: given[name] for name in OPERATORS["Experts"].attributes}


@pytest.mark.parametrize("name, tokens", [("nano", 1), ("nano", 3), ("nano", 9), ("base-mini", 2), ("base-mini", 21),
                                          ("no shared experts", 7)])  # fmt: skip
def test_a_moe_layer_of_the_cpp_host_equals_the_eager_operator(emulator, host, name: str, tokens: int) -> None:
    problem = stored(LAYERS[name], Storage("int4", 32), Storage("int8", 32))
    problem = replace(problem, routing=replace(problem.routing, tokens=tokens))
    arrays, want = random_layer(np.random.default_rng(tokens), problem)
    guarded_run(emulator, host, ("Experts", experts_attributes(problem)), arrays)
    assert relative_error(arrays["y"], want) < (CUDA_PRODUCT if tokens <= 4 else CUDA_TENSOR_PRODUCT)


@pytest.mark.parametrize("scheme, tokens", [("int4", 1), ("int8", 4), ("fp16", 2), ("int4", 40)])
def test_a_linear_of_the_cpp_host_equals_float64(emulator, host, scheme: str, tokens: int) -> None:
    rng, storage = np.random.default_rng(tokens), Storage(scheme, 32 if scheme != "fp16" else 0)
    arrays, values = random_weight(rng, (96, 64), storage, "weight")
    arrays |= {"x": half(rng, (1, tokens, 64)), "y": np.full((1, tokens, 96), np.nan, np.float16)}
    want = arrays["x"].astype(np.float64) @ values.T
    attributes = {"N": 96, "K": 64, "scheme": scheme, "group_size": storage.group_size}
    guarded_run(emulator, host, ("Linear", attributes), arrays)
    assert relative_error(arrays["y"], want) < (CUDA_PRODUCT if tokens <= 4 else CUDA_TENSOR_PRODUCT)


def python_result(emulator, case: tuple[str, dict], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the Python host's plan computes in the emulation; test_attention_kernels.py holds that to the operators."""
    operator, attributes = case
    arrays = {name: array.copy() for name, array in arrays.items()}
    shapes = {tensor.name: arrays[tensor.name].shape for tensor in OPERATORS[operator].inputs(attributes)}
    emulator.run(OPERATORS[operator].plan(attributes, shapes), arrays)
    return arrays


@pytest.mark.parametrize("name", ["small-mini, decode", "small-mini, later chunk", "base-mini, full cache"])
def test_latent_attention_of_the_cpp_host_equals_the_python_hosts_bit_for_bit(emulator, host, name: str) -> None:
    (p, past), rng = LATENT[name], np.random.default_rng(1)
    shapes = {"query": (p.batch, p.heads, p.tokens, p.rank), "query_rope": (p.batch, p.tokens, p.heads, p.rope_dim),
              "latent": (p.batch, p.tokens, p.rank), "key_rope": (p.batch, p.tokens, p.rope_dim),
              "cache": (p.batch, p.capacity, p.rank + p.rope_dim),
              "y": (p.batch, p.heads, p.tokens, p.rank)}  # fmt: skip
    arrays = {key: half(rng, shape) for key, shape in shapes.items()} | {"past_length": np.array(past)}
    arrays["cos"], arrays["sin"] = tables(rng, p.batch, p.tokens, p.rope_dim)
    case = ("LatentAttention", float32({"scale": p.scale}))
    want = python_result(emulator, case, arrays)
    guarded_run(emulator, host, case, arrays)
    assert all(np.array_equal(arrays[key], want[key]) for key in ("y", "cache"))


@pytest.mark.parametrize("name", ["tiny, decode", "nano, chunk", "groups of three"])
def test_attention_of_the_cpp_host_equals_the_python_hosts_bit_for_bit(emulator, host, name: str) -> None:
    (p, past), rng = HEADS[name], np.random.default_rng(1)
    new, cache = (p.batch, p.tokens, p.kv_heads * p.head_dim), (p.batch, p.capacity, p.kv_heads, p.head_dim)
    query = (p.batch, p.tokens, p.heads * p.head_dim)
    shapes = {"query": query, "key": new, "value": new, "key_cache": cache, "value_cache": cache, "y": query}
    arrays = {key: half(rng, shape) for key, shape in shapes.items()} | {"past_length": np.array(past)}
    arrays["cos"], arrays["sin"] = tables(rng, p.batch, p.tokens, p.head_dim)
    case = ("Attention", float32({"scale": p.scale}))
    want = python_result(emulator, case, arrays)
    guarded_run(emulator, host, case, arrays)
    assert all(np.array_equal(arrays[key], want[key]) for key in ("y", "key_cache", "value_cache"))


@pytest.mark.parametrize("name, tokens", [("Experts", 3), ("Experts", 30), ("Linear", 2), ("Attention", 1),
                                          ("LatentAttention", 5)])  # fmt: skip
def test_both_hosts_give_the_driver_the_same_parameters(host, monkeypatch, name: str, tokens: int) -> None:
    """Addresses, whole numbers and floats of every launch, beside `launcher.arguments`, which the Python host sends."""
    operator, (attributes, shapes) = OPERATORS[name], CASES[name]
    attributes = float32(attributes)
    tokens_at = {"x": -2, "query": 2 if name == "LatentAttention" else 1}
    shapes = {key: (*shape[:tokens_at[key] % len(shape)], tokens, *shape[tokens_at[key] % len(shape) + 1:])
              if key in tokens_at else shape for key, shape in shapes.items()}  # fmt: skip
    sides = {tensor.name: shapes.get(tensor.name, (1,)) for tensor in operator.inputs(attributes)}
    plan = operator.plan(attributes, sides)
    arrays = {key: np.zeros(side, np.uint8) for key, side in sides.items()}
    arrays |= {tensor.name: np.zeros(1, np.uint8) for tensor in operator.outputs}
    seen, launches = [], iter(plan.launches)
    host.on_launch(lambda kernel, sizes, allowed, stream, given: seen.append(
        (kernel.decode(), read_parameters(next(launches), given))) or 0)
    assert host.enqueue(host.plugin(name, attributes), name, attributes, arrays) == 0
    outputs = {tensor.name: arrays[operator.aliased.get(tensor.name, tensor.name)] for tensor in operator.outputs}
    addresses = {key: array.ctypes.data for key, array in (arrays | outputs).items()}
    addresses |= {key: host.workspace.ctypes.data + offset for key, offset in workspace_offsets(plan).items()}
    expected = [(one.kernel, tuple(value or None if kind is ctypes.c_void_p else value for value, kind in
                                   zip(*launcher.arguments(one, addresses), strict=True)))
                for one in plan.launches]  # fmt: skip
    assert seen == expected


@pytest.mark.parametrize("attributes", [EXPERTS, {**EXPERTS, **{key: BASE[key] for key in ("topk_method",)}}])
def test_fields_are_serialized_as_they_were_given(host, attributes: dict) -> None:
    ordered = {name: attributes[name] for name in OPERATORS["Experts"].attributes}
    assert host.serialized(host.plugin("Experts", attributes)) == list(ordered.items())


@pytest.mark.parametrize("name", CASES)
def test_types_formats_and_aliases_are_the_operators(host, name: str) -> None:
    operator, attributes = OPERATORS[name], float32(CASES[name][0])
    plugin, inputs = ctypes.c_void_p(host.plugin(name, attributes)), operator.inputs(attributes)
    assert host.driver.count_outputs(plugin) == len(operator.outputs)
    names = [tensor.name for tensor in inputs]
    for number, tensor in enumerate(operator.outputs):
        source = operator.aliased.get(tensor.name)
        assert host.driver.aliased(plugin, number) == (-1 if source is None else names.index(source))
    for place, tensor in enumerate((*inputs, *operator.outputs)):
        taken = {kind for kind, number in TYPES.items()
                 if host.driver.supports(plugin, place, number, 0, len(inputs)) & 1}  # fmt: skip
        assert taken == {tensor.dtype}
        assert not host.driver.supports(plugin, place, TYPES[tensor.dtype], 1, len(inputs)) & 1
    given = (ctypes.c_int32 * len(inputs))(*(TYPES[tensor.dtype] for tensor in inputs))
    made = (ctypes.c_int32 * len(operator.outputs))()
    assert host.driver.output_types(plugin, made, len(made), given, len(given)) == 0
    assert list(made) == [TYPES[tensor.dtype] for tensor in operator.outputs]
    given[0] = TYPES["int64"]
    assert host.driver.output_types(plugin, made, len(made), given, len(given)) != 0


def run_linear(host: PlayedHost) -> int:
    attributes = CASES["Linear"][0]
    arrays = {"x": np.zeros((1, 2, 128), np.float16), **dict.fromkeys(("weight", "weight_scale", "y"), np.zeros(1))}
    return host.enqueue(host.plugin("Linear", attributes), "Linear", attributes, arrays)


def test_a_failed_launch_fails_the_run(host) -> None:
    host.on_launch(lambda *_: 700)
    assert run_linear(host) != 0
    host.host.vl2_plugin_error.restype = ctypes.c_char_p
    assert host.host.vl2_plugin_error()


def test_an_attribute_that_is_absent_or_of_another_type_makes_no_plugin(host) -> None:
    assert host.plugin("Linear", {"N": 64, "K": 128, "scheme": "int4"}) is None
    assert host.plugin("Linear", {"N": 64, "K": 128, "scheme": "int4", "group_size": 32.0}) is None
    assert host.plugin("Sparse", {}) is None


def test_the_library_knows_which_engines_it_runs(host) -> None:
    host.host.vl2_plugin_hash.restype = ctypes.c_char_p
    assert host.host.vl2_plugin_hash().decode() == plugin_hash()


def test_without_a_context_nothing_is_launched(host) -> None:
    host.on_launch(lambda *_: pytest.fail("launched"))
    flag = ctypes.c_int.in_dll(host.cuda, "without_context")
    flag.value = 1
    try:
        assert run_linear(host) != 0
    finally:
        flag.value = 0


def test_kernels_of_this_gpu_are_loaded(host) -> None:
    host.on_launch(lambda *_: 0)
    assert run_linear(host) == 0
    image = ctypes.c_void_p.in_dll(host.cuda, "loaded_image").value
    assert ctypes.string_at(image) == b"kernels of sm_86"


@pytest.mark.parametrize("major, minor, told", [(8, 9, "has kernels for sm_86, and the GPU is sm_89"), (8, 6, "")])
def test_kernels_of_another_gpu_are_refused_by_name(tmp_path, major: int, minor: int, told: str) -> None:
    """In a process of its own: a library keeps the kernels of a context that it has once seen."""
    code = ("import ctypes, sys; from pathlib import Path; from tests.plugins.tensorrt.played_host import PlayedHost;"
            "from tests.plugins.tensorrt.test_host import run_linear; host = PlayedHost(Path(sys.argv[1]));"
            "host.on_launch(lambda *_: 0);"
            "[setattr(ctypes.c_int.in_dll(host.cuda, name), 'value', int(value)) for name, value in"
            " zip(('major', 'minor'), sys.argv[2:])]; sys.exit(run_linear(host))")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(major), str(minor)], capture_output=True,
                          text=True, cwd=Path(__file__).parents[3])  # fmt: skip
    assert (done.returncode != 0) == bool(told) and told in done.stderr, done.stderr

"""The C++ host plans every launch as Python does: kernels, grids, arguments, scratch, and what it refuses.

The plans are written twice, as pure functions of a few numbers; Python's are the truth, which the emulation runs.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.plugins.tensorrt.test_operators import EXPERTS
from tests.plugins.tensorrt.test_plugin_shapes import NODES
from vl2.errors import VL2Error
from vl2.plugins.tensorrt.host import SOURCE
from vl2.plugins.tensorrt.operators import OPERATORS
from vl2.plugins.tensorrt.plugin import largest_workspace

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on this machine")
many = settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
KINDS = {int: "i", float: "f", str: "s"}
# Small numbers are frequent, and so are those of published models.
_sizes = st.one_of(st.integers(1, 40).map(lambda count: 8 * count),
                   st.sampled_from([128, 256, 512, 896, 1280, 1408, 2048, 2816, 8192]))  # fmt: skip
_storages = st.one_of(
    st.tuples(st.sampled_from(["int4", "int8"]), st.sampled_from([16, 32, 32, 64, 128, 24, 0])),
    st.just(("fp16", 0)),
)
_scales = st.floats(2**-10, 4, width=32)


class Plans:
    """plan_driver.cpp."""

    def __init__(self, folder: Path):
        built = folder / "plans.so"
        source = Path(__file__).with_name("plan_driver.cpp")
        subprocess.run(["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-I", str(SOURCE.parent), str(source),
                        "-o", str(built)], check=True)  # fmt: skip
        self._library = ctypes.CDLL(str(built))

    def ask(self, name: str, *words: str) -> str:
        call = getattr(self._library, name)
        call.restype = ctypes.c_char_p
        return call(*(word.encode() for word in words)).decode()


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    return Plans(tmp_path_factory.mktemp("plans"))


def as_words(attributes: dict) -> str:
    return "\n".join(f"{name} {KINDS[type(value)]} {value!r}".replace("'", "") for name, value in attributes.items())


def as_sides(shapes) -> str:
    return "\n".join(" ".join(map(str, (len(shape), *shape))) for shape in shapes)


def python_plan(operator: str, attributes: dict, shapes: dict) -> object:
    """As plan_driver.cpp writes it."""
    try:
        plan = OPERATORS[operator].plan(attributes, shapes)
    except VL2Error as error:
        return f"refused\n{error.message}\n{error.hint}"
    launches = [[one.kernel, list(one.grid), list(one.block), one.shared_bytes,
                 [{"float": float(f"{each:.9g}")} if isinstance(each, float) else each for each in one.arguments]]
                for one in plan.launches]  # fmt: skip
    return {"launches": launches, "workspace": [list(item) for item in plan.workspace.items()]}


def check(plans: Plans, operator: str, attributes: dict, shapes: dict) -> object:
    """Both plans, which have to be equal."""
    expected = python_plan(operator, attributes, shapes)
    told = plans.ask("plan_of", operator, as_words(attributes), as_sides(shapes.values()))
    assert (told if told.startswith("refused") else json.loads(told)) == expected
    return expected


@st.composite
def experts(draw) -> tuple[dict, int]:
    groups = draw(st.sampled_from([1, 1, 2, 4, 8]))
    count = groups * draw(st.integers(1, 32))
    storages = {prefix: draw(_storages) for prefix in ("", "down_", "shared_", "shared_down_")}
    if draw(st.integers(0, 3)):  # forms of a whole layer are often one
        storages = dict.fromkeys(storages, storages[""])
    forms = {f"{prefix}{key}": value for prefix, storage in storages.items()
             for key, value in zip(("scheme", "group_size"), storage, strict=True)}  # fmt: skip
    routing = {"experts": count, "top_k": draw(st.integers(1, min(count + 1, 33))),
               "topk_method": draw(st.sampled_from(("greedy", "group_limited_greedy", "noaux_tc") * 5 + ("random",))),
               "scoring_func": draw(st.sampled_from(["softmax", "sigmoid"])), "n_group": groups,
               "topk_group": draw(st.integers(1, groups)), "norm_topk_prob": draw(st.integers(0, 1)),
               "routed_scaling_factor": draw(_scales)}  # fmt: skip
    sizes = {"hidden_size": draw(_sizes), "inner_size": draw(_sizes),
             "shared_size": draw(st.one_of(st.just(0), _sizes))}  # fmt: skip
    return {**routing, **sizes, **forms}, draw(st.one_of(st.integers(1, 4), st.integers(5, 600)))


@many
@given(experts())
def test_a_moe_layer_is_planned_alike(plans: Plans, drawn: tuple[dict, int]) -> None:
    attributes, tokens = drawn
    names = [tensor.name for tensor in OPERATORS["Experts"].inputs(attributes)]
    check(plans, "Experts", attributes, {name: (tokens, 8) for name in names})


@many
@given(st.integers(1, 200_000), _sizes, _storages, st.lists(st.integers(1, 300), min_size=1, max_size=3))
def test_a_linear_is_planned_alike(plans: Plans, rows: int, columns: int, storage: tuple, sides: list) -> None:
    attributes = {"N": rows, "K": columns, "scheme": storage[0], "group_size": storage[1]}
    shapes = {tensor.name: (1,) for tensor in OPERATORS["Linear"].inputs(attributes)}
    check(plans, "Linear", attributes, {**shapes, "x": (*sides, columns)})


@many
@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 1, 2, 4]), st.sampled_from([1, 2, 5, 100, 512]),
       st.sampled_from([16, 32, 40, 64, 96, 128, 256, 272]), st.integers(1, 9000), _scales)  # fmt: skip
def test_attention_is_planned_alike(plans: Plans, batch, kv_heads, group, tokens, size, capacity, scale) -> None:
    new = (batch, tokens, kv_heads * group * size)
    cache = (batch, capacity, kv_heads, size)
    shapes = {"query": new, "key": new, "value": new, "cos": (1,), "sin": (1,), "key_cache": cache,
              "value_cache": cache, "past_length": ()}  # fmt: skip
    check(plans, "Attention", {"scale": scale}, shapes)


@many
@given(st.integers(1, 3), st.sampled_from([1, 4, 16, 32]), st.sampled_from([1, 2, 5, 100, 512]),
       st.sampled_from([64, 120, 256, 512, 528]), st.sampled_from([8, 20, 64]), st.integers(1, 9000),
       _scales)  # fmt: skip
def test_latent_attention_is_planned_alike(plans: Plans, batch, heads, tokens, rank, rope, capacity, scale) -> None:
    shapes = {"query": (batch, heads, tokens, rank), "query_rope": (1,), "latent": (1,), "key_rope": (1,), "cos": (1,),
              "sin": (1,), "cache": (batch, capacity, rank + rope), "past_length": ()}  # fmt: skip
    check(plans, "LatentAttention", {"scale": scale}, shapes)


def test_what_is_drawn_reaches_plans_of_every_kind_and_refusals(plans: Plans) -> None:
    """So that the properties above do not hold because everything is refused."""
    found, told = set(), set()

    @settings(max_examples=600, deadline=None, derandomize=True, database=None)
    @given(experts())
    def draw(drawn: tuple[dict, int]) -> None:
        attributes, tokens = drawn
        names = [tensor.name for tensor in OPERATORS["Experts"].inputs(attributes)]
        plan = python_plan("Experts", attributes, {name: (tokens, 8) for name in names})
        if isinstance(plan, str):
            told.add(plan)
        else:
            found.update(launch[0] for launch in plan["launches"])

    draw()
    assert {f"vl2_{kind}_{scheme}" for kind in ("gate_up", "down", "gated_product", "product")
            for scheme in ("int4", "int8", "fp16")} <= found  # fmt: skip
    assert len(told) > 20


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("tokens", [1, 3, 512])
def test_both_hosts_ask_for_the_same_scratch(plans: Plans, name: str, tokens: int) -> None:
    operator, attributes, shapes = NODES[name]
    low, high = shapes(1, 1), shapes(tokens, 4096)
    ranges = tuple(zip(low.values(), high.values(), strict=True))
    expected = largest_workspace(operator, tuple(attributes.items()), ranges)
    told = plans.ask("workspace_of", operator, as_words(attributes), as_sides(low.values()), as_sides(high.values()))
    assert int(told) == expected > 0


CASES = {"Experts": [EXPERTS, {**EXPERTS, "shared_size": 0, "topk_method": "greedy"}],
         "Linear": [{"N": 64, "K": 128, "scheme": scheme, "group_size": 32} for scheme in ("int4", "fp16")],
         "LatentAttention": [{"scale": 0.1}], "Attention": [{"scale": 0.1}]}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_both_hosts_tell_tensorrt_of_the_same_inputs_outputs_and_fields(plans: Plans, name: str) -> None:
    operator = OPERATORS[name]
    for attributes in CASES[name]:
        inputs, outputs, fields = json.loads(plans.ask("tensors_of", name, as_words(attributes)))
        assert inputs == [[tensor.name, tensor.dtype] for tensor in operator.inputs(attributes)]
        aliased = {tensor.name: operator.aliased.get(tensor.name) == tensor.like for tensor in operator.outputs}
        assert outputs == [[tensor.name, tensor.like, tensor.last or "", aliased[tensor.name]]
                           for tensor in operator.outputs]  # fmt: skip
        assert {tensor.dtype for tensor in operator.outputs} == {"float16"}, "the C++ host has them so"
        kinds = {int: 0, float: 1, str: 2}
        assert fields == [[name, kinds[kind]] for name, kind in operator.attributes.items()]


def test_a_float_reaches_the_kernel_as_pythons_does(plans: Plans) -> None:
    """Attributes are float32 in an engine."""
    scale = float(np.float32(1 / np.sqrt(192)))
    _, attributes, shapes = "Attention", {"scale": scale}, NODES["tiny"][2](1, 64)
    plan = check(plans, "Attention", attributes, shapes)
    assert np.float32(plan["launches"][1][4][-1]["float"]) == np.float32(scale)

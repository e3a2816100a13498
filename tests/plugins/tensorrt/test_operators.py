"""What TensorRT is told of the operators agrees with their launch plans and with the lowering."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vl2.errors import VL2Error
from vl2.plugins.tensorrt.operators import OPERATORS

ROUTING = {"experts": 8, "top_k": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 2,
           "topk_group": 1, "norm_topk_prob": 1, "routed_scaling_factor": 2.5}  # fmt: skip
EXPERTS = {**ROUTING, "hidden_size": 64, "inner_size": 32, "shared_size": 64, "scheme": "int4", "group_size": 32,
           "down_scheme": "int8", "down_group_size": 32, "shared_scheme": "fp16", "shared_group_size": 0,
           "shared_down_scheme": "int8", "shared_down_group_size": 64}  # fmt: skip
CASES = {
    "Experts": (EXPERTS, {"x": (5, 64)}),
    "Linear": ({"N": 64, "K": 128, "scheme": "int4", "group_size": 32}, {"x": (1, 5, 128)}),
    "LatentAttention": ({"scale": 0.1}, {"query": (1, 4, 5, 128), "cache": (1, 32, 192)}),
    "Attention": ({"scale": 0.1}, {"query": (1, 5, 256), "key_cache": (1, 32, 4, 64)}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_buffer_of_a_plan_is_an_input_an_output_or_scratch(name: str) -> None:
    operator, (attributes, shapes) = OPERATORS[name], CASES[name]
    plan = operator.plan(attributes, shapes)
    known = {tensor.name for tensor in (*operator.inputs(attributes), *operator.outputs)} | plan.workspace.keys()
    read = {argument for launch in plan.launches for argument in launch.arguments if isinstance(argument, str)}
    assert plan.launches and read <= known, f"the plan reads {read - known}"
    assert {tensor.name for tensor in operator.inputs(attributes)} <= read, "an input is read by no kernel"


@pytest.mark.parametrize("name", CASES)
def test_aliased_outputs_have_the_shape_and_type_of_their_inputs(name: str) -> None:
    operator = OPERATORS[name]
    inputs = {tensor.name: tensor for tensor in operator.inputs(CASES[name][0])}
    outputs = {tensor.name: tensor for tensor in operator.outputs}
    for output, source in operator.aliased.items():
        assert (outputs[output].like, outputs[output].dtype) == (source, inputs[source].dtype)


def test_a_wrong_number_of_inputs_is_told_with_the_right_names() -> None:
    with pytest.raises(VL2Error, match="Linear got 2 inputs, expected 3: x, weight, weight_scale"):
        OPERATORS["Linear"].check_types(CASES["Linear"][0], ["float16", "int8"])


def test_a_missing_or_mistyped_attribute_is_named() -> None:
    for given, told in (({"N": 4}, "no attribute `K`"), ({"N": "4"}, "`N` of vl2::Linear is '4', expected int")):
        with pytest.raises(VL2Error, match=told):
            OPERATORS["Linear"].check_attributes(given)


def test_a_board_needs_neither_torch_nor_onnx_to_build() -> None:
    code = ("import sys, vl2.plugins.tensorrt.engines, vl2.plugins.tensorrt.build, vl2.planning.engine_fit;"
            "sys.exit(str({'torch', 'onnx', 'onnx_ir', 'safetensors'} & set(sys.modules) or '') or 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""Every name of TensorRT that our code uses exists from JetPack 6.2's version to the newest.

api.json holds what the bindings of these versions have; `python tests/plugins/tensorrt/record_api.py` records it again.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.plugins.tensorrt.record_api import API, BINDINGS, CLASSES
from vl2.plugins.tensorrt.flavour import load_tensorrt

ROOT = Path(__file__).parents[3]
SOURCES = sorted(path for folder in ("plugins/tensorrt", "runtime/engines") for path in (ROOT / folder).glob("*.py"))
# Used with the flavour TensorRT-RTX only.
RTX_ONLY = {"ComputeCapability"}
RTX_MEMBERS = {
    "ComputeCapability": ("CURRENT", "SM86"), "BuilderFlag": ("REQUIRE_USER_ALLOCATION",),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability", "set_flag"),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER", "LAZY"), "ICudaEngine": ("create_runtime_config",),
    "IExecutionContext": ("is_stream_capturable",), "IRuntimeCache": ("deserialize", "serialize"),
    "IRuntimeConfig": ("create_runtime_cache", "set_runtime_cache", "set_execution_context_allocation_strategy",
                       "dynamic_shapes_kernel_specialization_strategy"),
}  # fmt: skip
# What is called on objects, whose classes the sources do not name.
MEMBERS = {
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "ParserError": ("desc",),
    "INetworkDefinition": ("num_layers",),
    "IBuilderConfig": ("set_preview_feature", "add_optimization_profile"),
    "IOptimizationProfile": ("set_shape",),
    "IHostMemory": ("nbytes",),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": ("create_execution_context", "device_memory_size_v2", "get_tensor_location", "get_tensor_mode",
                    "get_tensor_name", "get_tensor_shape", "num_io_tensors"),
    "IExecutionContext": ("execute_async_v3", "set_device_memory", "set_input_shape", "set_optimization_profile_async",
                          "set_tensor_address"),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "TensorLocation": ("DEVICE",),
    "TensorIOMode": ("INPUT",),
    "IPluginRegistry": ("get_creator", "load_library", "register_creator"),
    "IExprBuilder": ("constant",),
    "DynamicPluginTensorDesc": ("desc", "min", "max"),
    "PluginTensorDesc": ("dims", "type", "format"),
    "PluginField": ("name", "type", "data"),
    "DataType": ("FLOAT", "HALF", "INT8", "INT64"),
    "IPluginV3OneBuildV2": ("get_output_data_types", "get_output_shapes", "get_aliased_input", "configure_plugin",
                            "supports_format_combination", "get_workspace_size", "num_outputs"),
    "IPluginV3OneRuntime": ("on_shape_change", "attach_to_context", "get_fields_to_serialize", "set_tactic", "enqueue"),
    "IPluginV3OneCore": ("plugin_name", "plugin_namespace", "plugin_version"),
    "IPluginV3": ("get_capability_interface", "clone"),
    "IPluginCreatorV3One": ("create_plugin", "field_names", "name", "plugin_namespace", "plugin_version"),
}  # fmt: skip


def used_names() -> set[tuple[str, ...]]:
    """Chains that begin with `trt` or `self.trt` in the sources, such as (PreviewFeature, ALIASED_PLUGIN_IO_10_03)."""
    found: set[tuple[str, ...]] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            while isinstance(node, ast.Attribute):
                names, node = [node.attr, *names], node.value
            if isinstance(node, ast.Name) and node.id == "self" and names[:1] == ["trt"]:
                names = names[1:]
            elif not isinstance(node, ast.Name) or node.id != "trt":
                continue
            if names:
                found.add(tuple(names))
    return {names for names in found if names[0] not in RTX_ONLY and not names[0].startswith("__")}


@pytest.mark.parametrize("version", BINDINGS)
def test_every_name_that_we_use_exists_in(version: str) -> None:
    recorded = json.loads(API.read_text())[version]
    wanted = used_names() | {(name, member) for name, members in MEMBERS.items() for member in members}
    assert len(wanted) > 60, "the sources are not where this test looks for them"
    for name, *members in wanted:
        assert name in recorded, f"trt.{name} is not in TensorRT {version}"
        # further parts, such as __init__, are Python's
        if members and not members[0].startswith("_"):
            assert name in CLASSES, f"record trt.{name} as well: add it to record_api.CLASSES"
            assert members[0] in recorded[name], f"trt.{name}.{members[0]} is not in TensorRT {version}"


def test_the_same_names_exist_in_tensorrt_rtx(rtx: str) -> None:
    module = load_tensorrt(rtx)
    tables = (*MEMBERS.items(), *RTX_MEMBERS.items())
    for name, *members in used_names() | {(name, member) for name, each in tables for member in each}:
        assert hasattr(module, name), f"trt.{name}"
        if members:
            assert hasattr(getattr(module, name), members[0]), f"trt.{name}.{members[0]}"

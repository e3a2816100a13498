"""Records which names TensorRT's Python bindings have, for test_api.py, on a machine without TensorRT and GPU.

    python tests/plugins/tensorrt/record_api.py

PyPI has the bindings of every version and NVIDIA's own index the libraries they load. Of these they need nine functions
only, which a stub gives: then the module can be imported and looked at. Needs pip, g++ and about 20 MB of downloads.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Classes whose members our code names; of others only the name is recorded.
CLASSES = {
    "Builder", "DataType", "DynamicPluginTensorDesc", "ExecutionContextAllocationStrategy", "IBuilderConfig",
    "ICudaEngine", "IExecutionContext", "IExprBuilder", "IHostMemory", "ILogger", "INetworkDefinition",
    "IOptimizationProfile", "IPluginCreatorV3One", "IPluginRegistry", "IPluginV3", "IPluginV3OneBuildV2",
    "IPluginV3OneCore", "IPluginV3OneRuntime", "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError",
    "PluginField", "PluginFieldCollection", "PluginFieldType", "PluginTensorDesc", "PreviewFeature", "Runtime",
    "TensorFormat", "TensorIOMode", "TensorLocation",
}  # fmt: skip
API = Path(__file__).with_name("api.json")
BINDINGS = {"10.3.0": "tensorrt-cu12-bindings", "10.13.3.9": "tensorrt-cu12-bindings",
            "10.16.1.11": "tensorrt-cu13-bindings", "11.4.0.106": "tensorrt-cu13-bindings"}  # fmt: skip
_FUNCTIONS = ("createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL",
              "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry",
              "getPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins")  # fmt: skip
_LIBRARIES = ("libnvinfer.so", "libnvonnxparser.so", "libnvinfer_plugin.so")
_LOOK = """
import importlib.util, inspect, json, sys
spec = importlib.util.spec_from_file_location("tensorrt", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
public = lambda thing: sorted(name for name in dir(thing) if not name.startswith("_"))
print(json.dumps({name: public(getattr(module, name)) if inspect.isclass(getattr(module, name)) else []
                  for name in public(module)}))
"""


def names_of(version: str, folder: Path) -> dict[str, list[str]]:
    """The public names of a version's module, and of each of CLASSES its members."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*pip, f"{BINDINGS[version]}=={version}"], check=True)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        inside = next(name for name in archive.namelist() if name.endswith("/tensorrt.so"))
        archive.extract(inside, folder)
    source = folder / "stub.c"
    source.write_text("".join(f"void* {name}() {{ return 0; }}\n" for name in _FUNCTIONS))
    place = (folder / inside).parent
    for library in _LIBRARIES:
        name = f"{library}.{version.split('.')[0]}"
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(place / name), str(source)],
                       check=True)  # fmt: skip
    done = subprocess.run([sys.executable, "-c", _LOOK, str(folder / inside)], check=True, capture_output=True,
                          env={"LD_LIBRARY_PATH": str(place)}, text=True)  # fmt: skip
    return {name: members if name in CLASSES else [] for name, members in json.loads(done.stdout).items()}


def main() -> None:
    """Writes api.json."""
    found = {}
    for version in BINDINGS:
        with tempfile.TemporaryDirectory() as folder:
            found[version] = names_of(version, Path(folder))
    lines = [f' "{version}": {json.dumps(names, separators=(",", ":"))}' for version, names in found.items()]
    API.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

"""The arrows between the parts, and the limits that keep the device half light, checked on the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"vl2": "vl2", "model": "vl2.model", "calib": "vl2.calib", "quant": "vl2.quant",
           "plugins": "vl2.plugins", "export": "vl2.export", "runtime": "vl2.runtime", "nano": "vl2.nano",
           "accuracy": "vl2.accuracy", "layerwise": "vl2.layerwise"}
# What each part may import besides itself and the contract `vl2`.
ARROWS = {
    "vl2": set(), "model": set(), "calib": {"model", "nano"}, "quant": {"model"}, "plugins": {"model"},
    "hosts": set(), "export": {"model", "plugins"}, "runtime": {"hosts"}, "nano": {"model", "runtime"},
    "accuracy": {"runtime"}, "layerwise": {"model", "calib", "quant", "accuracy"},
    "machine": {"runtime", "hosts"}, "planning": {"runtime", "machine"}, "measure": {"runtime", "machine", "planning"},
    "cli": {"machine", "planning", "measure", "model", "calib", "quant", "plugins", "hosts", "export", "runtime",
            "nano", "accuracy", "layerwise"},
}
# Of plugins/, what runs them: the kernels with their launch plans, and TensorRT's side of them.
HOSTS = {"cuda", "tensorrt"}
DEVICE_HALF = {"vl2", "hosts", "runtime", "accuracy", "cli", "machine", "planning", "measure"}
HEAVY = {"torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "huggingface_hub"}


def sources(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts]


def part_of(module: str) -> str:
    """The part that a dotted module name belongs to: `vl2.model.moe` is in `model`, `vl2.image` in `vl2`."""
    second, third = (*module.split("."), "", "")[1:3]
    if second == "plugins" and third in HOSTS:
        return "hosts"
    return second if second in ARROWS else "vl2"


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {f"vl2.{alias.name}" for alias in node.names} if node.module == "vl2" else {node.module}
    return names


def all_sources() -> list[tuple[str, Path]]:
    found = [(folder, path) for folder in FOLDERS for path in sources(folder)]
    return [(_inner_part(part, path), path) for part, path in found]


def _inner_part(part: str, path: Path) -> str:
    """Some folders of the contract are parts of their own, such as the command line."""
    inner = path.relative_to(ROOT).parts[1]
    if part == "plugins" and inner in HOSTS:
        return "hosts"
    return inner if part == "vl2" and inner in ARROWS else part


@pytest.mark.parametrize("part, path", all_sources(), ids=lambda value: str(value).replace(str(ROOT) + "/", ""))
def test_imports_follow_the_arrows(part: str, path: Path) -> None:
    parts = {part_of(name) for name in imported(path) if name == "vl2" or name.startswith("vl2.")}
    assert parts - {part, "vl2"} <= ARROWS[part], f"{path} imports {parts}"


@pytest.mark.parametrize("path", [path for part, path in all_sources() if part in DEVICE_HALF],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_the_device_half_never_names_a_workstation_package(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & HEAVY


def test_every_folder_with_python_is_a_listed_package() -> None:
    listed = (ROOT / "pyproject.toml").read_text()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("__init__.py"):
            name = path.parent.relative_to(ROOT).as_posix().replace("/", ".")
            package = name if folder == "vl2" else f"vl2.{name}"
            assert f'"{package}"' in listed, f"{package} is missing in pyproject.toml"


def test_help_imports_nothing_heavy() -> None:
    code = ("import sys; from vl2.cli import VERBS, run_command, cli; run_command(cli, 'vl2', ['--help']);"
            "[run_command(cli, 'vl2', [verb, '--help']) for verb in VERBS];"
            "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'PIL', 'tokenizers'} & set(sys.modules);"
            "sys.exit(str(heavy) if heavy else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

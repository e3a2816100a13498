"""What a user installs: the wheel holds every module and the shipped model, and runs where torch is not installed."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "vl2" / "libvl2_ops.so"
PACKAGES = {"vl2": "vl2", "model": "vl2/model", "calib": "vl2/calib", "quant": "vl2/quant", "plugins": "vl2/plugins",
            "export": "vl2/export", "runtime": "vl2/runtime", "nano": "vl2/nano", "accuracy": "vl2/accuracy",
            "layerwise": "vl2/layerwise"}


def run(*command: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree, built from a copy without the build folders of others."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for name in files:
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    if LIBRARY.is_file():
        # compiled of these sources when the tree was installed; setuptools takes what is newer than they are
        built = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "vl2"
        built.mkdir(parents=True)
        shutil.copyfile(LIBRARY, built / LIBRARY.name)
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module_and_the_shipped_model(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for folder, package in PACKAGES.items():
        paths = [path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts]
        expected |= {f"{package}/{path.relative_to(ROOT / folder).as_posix()}" for path in paths}
    expected |= {f"vl2/nano/checkpoint/{path.name}" for path in (ROOT / "nano" / "checkpoint").iterdir()}
    expected |= {f"vl2/planning/{path.name}" for path in (ROOT / "vl2" / "planning").glob("*.json")}
    host = ROOT / "plugins" / "tensorrt" / "host"
    expected |= {f"vl2/plugins/tensorrt/host/{path.name}" for path in host.iterdir()}
    expected |= {f"vl2/runtime/serve/page/{name}" for name in ("index.html", "page.css", "page.js")}
    expected |= {f"vl2/runtime/serve/page/{path.name}" for path in (ROOT / "runtime" / "serve" / "page").iterdir()}
    expected |= {f"vl2/{LIBRARY.name}"} if LIBRARY.is_file() else set()
    assert expected | {"vl2/py.typed", "vl2/nano/demo.png"} <= held
    assert not {name for name in held if name.split("/")[0] in PACKAGES.keys() - {"vl2"}}


def test_an_installed_runtime_answers_where_torch_is_not_installed(wheel, nano_bundle, tmp_path):
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    installed = run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", wheel)
    if installed.returncode != 0 and "No matching distribution" in installed.stderr + installed.stdout:
        pytest.skip("no package index can be reached to install the runtime's dependencies")
    assert installed.returncode == 0, installed.stderr
    assert run(python, "-c", "import torch").returncode != 0
    done = run(tmp_path / "venv" / "bin" / "vl2", "run", nano_bundle, "--image", ROOT / "nano" / "demo.png",
               "--prompt", "What is the total?", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stop_reason"] == "eos"
    in_the_tree = run(python, "-c", "from vl2.runtime import open_bundle", cwd=ROOT)
    assert in_the_tree.returncode == 0, in_the_tree.stderr
    refused = run(tmp_path / "venv" / "bin" / "vl2-export", ROOT / "nano" / "checkpoint", "--out", "b", cwd=tmp_path)
    assert refused.returncode == 1 and "'.[export]'" in refused.stderr and not (tmp_path / "b").exists()

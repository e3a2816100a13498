"""Comparing runs on a device, where no workstation package is installed."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import importlib, pkgutil, sys
for name in ("torch", "onnx", "onnxscript", "safetensors", "huggingface_hub", "matplotlib"):
    sys.modules[name] = None
import vl2.accuracy
for module in pkgutil.walk_packages(vl2.accuracy.__path__, "vl2.accuracy."):
    importlib.import_module(module.name)
from vl2.cli import cli, run_command
sys.exit(run_command(cli, "vl2", ["compare", *sys.argv[1:3], "--data", sys.argv[3], "--max-new-tokens", "3"]))
"""


def test_the_whole_package_imports_and_compares_without_workstation_packages(
    reference_bundle: Path, candidate_bundle: Path, questions_file: Path
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(reference_bundle), str(candidate_bundle), str(questions_file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# candidate.bundle (fp32) against reference.bundle (fp32)")

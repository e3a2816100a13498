"""The device half runs where no workstation package is installed."""

import subprocess
import sys
from pathlib import Path

from tests.runtime.small_bundle import numpy_model_of
from vl2.runtime import GenerationOptions

GOLDENS = Path(__file__).parents[1] / "goldens"

SCRIPT = """
import importlib, pkgutil, sys
for name in ("torch", "onnx", "onnxscript", "safetensors", "huggingface_hub", "tensorrt", "tensorrt_rtx", "cuda"):
    sys.modules[name] = None
import vl2.runtime
vl2.runtime.open_bundle(sys.argv[1])
assert "vl2.runtime.engines" not in sys.modules, "engines were not asked for"
for module in pkgutil.walk_packages(vl2.runtime.__path__, "vl2.runtime."):
    importlib.import_module(module.name)
from vl2.runtime import GenerationOptions, open_bundle
from vl2.runtime.grounding import draw
model = open_bundle(sys.argv[1])
chat = model.chat()
first = chat.ask("What is shown?", [sys.argv[2]], GenerationOptions(max_new_tokens=9, ignore_eos=True))
second = chat.ask("And why?", options=GenerationOptions(max_new_tokens=2, temperature=1.0, seed=1))
assert second.reused_tokens > first.prompt_tokens and model.backend
print(*first.token_ids)
"""


def test_the_whole_runtime_imports_and_answers_without_workstation_packages(shared_bundle: Path) -> None:
    image = GOLDENS / "images" / "tiny_20x30.png"
    done = subprocess.run([sys.executable, "-c", SCRIPT, shared_bundle, image], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = numpy_model_of(shared_bundle).ask("What is shown?", [image], GenerationOptions(9, ignore_eos=True))
    assert done.stdout.split() == [str(token) for token in expected.token_ids]
    assert done.stderr == ""

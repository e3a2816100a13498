"""The onnxruntime backend against the same graphs in NumPy."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image

from tests.runtime.small_bundle import HIDDEN, SIDE, VOCAB, NumpyBackend, numpy_model_of, save_graph
from tests.runtime.small_bundle import graph as small_graph
from vl2.errors import VL2Error
from vl2.manifest import read_manifest
from vl2.runtime import BundleOptions, GenerationOptions, open_bundle
from vl2.runtime.ort import OrtBackend
from vl2.runtime.providers import CPU, CUDA

# Two orders of summing some hundred float32 numbers of size one.
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def backend(shared_bundle: Path) -> OrtBackend:
    return OrtBackend(shared_bundle, read_manifest(shared_bundle), BundleOptions(device="cpu", threads=1))


def decoder_arrays(past: int, tokens: int) -> tuple[dict, dict]:
    random = np.random.default_rng(past * 100 + tokens)
    buffer = random.normal(size=(1, past + tokens, 1, HIDDEN)).astype(np.float32)
    places = np.zeros((1, past + tokens, 1, 1), np.float32)
    places[0, :past, 0, 0] = np.arange(past)
    feeds = {"inputs_embeds": random.normal(size=(1, tokens, HIDDEN)).astype(np.float32),
             "position_ids": np.arange(past, past + tokens)[None], "attention_mask": np.ones((1, past + tokens), bool),
             "past_key.0": buffer[:, :past], "past_value.0": places[:, :past]}
    results = {"logits": np.zeros((1, VOCAB), np.float32),
               "new_key.0": buffer[:, past:], "new_value.0": places[:, past:]}
    return feeds, results


@given(past=st.integers(0, 70), tokens=st.integers(1, 40))
def test_the_decoder_equals_numpy_for_every_past_and_length(backend: OrtBackend, past: int, tokens: int) -> None:
    feeds, results = decoder_arrays(past, tokens)
    expected = {name: np.zeros_like(array) for name, array in results.items()}
    NumpyBackend().run("decoder", feeds, expected)
    before = {name: array.copy() for name, array in feeds.items()}
    backend.run("decoder", feeds, results)
    for name, array in expected.items():
        np.testing.assert_allclose(results[name], array, **CLOSE)
    for name, array in before.items():
        np.testing.assert_array_equal(feeds[name], array)


def test_the_vision_graph_equals_numpy_and_writes_into_a_part_of_an_array(backend: OrtBackend) -> None:
    tiles = np.random.default_rng(0).normal(size=(3, 3, SIDE, SIDE)).astype(np.float32)
    found, expected = (np.zeros((5, 16, HIDDEN), np.float32) for _ in range(2))
    backend.run("vision", {"tiles": tiles}, {"image_features": found[1:4]})
    NumpyBackend().run("vision", {"tiles": tiles}, {"image_features": expected[1:4]})
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert not found[[0, 4]].any()


def test_an_answer_equals_the_one_on_numpy(shared_bundle: Path) -> None:
    images, options = [Image.effect_noise((60, 40), 90)], GenerationOptions(40, ignore_eos=True, prefill_chunk=50)
    onnx, plain = (model.ask("What is shown?", images, options)
                   for model in (open_bundle(shared_bundle), numpy_model_of(shared_bundle)))
    assert onnx.token_ids == plain.token_ids and onnx.text == plain.text


def test_the_description_is_one_line_with_device_and_threads(backend: OrtBackend) -> None:
    assert backend.description.startswith("CPU, 1 thread, onnxruntime ")
    assert "\n" not in backend.description


def test_a_broken_graph_is_an_error_of_the_user(bundle: Path) -> None:
    (bundle / "decoder.onnx").write_bytes(b"nonsense")
    backend = OrtBackend(bundle, read_manifest(bundle), BundleOptions(device="cpu"))
    with pytest.raises(VL2Error, match=r"onnxruntime .* cannot load .*decoder\.onnx") as error:
        backend.load("decoder")
    assert error.value.hint


def test_a_graph_that_differs_from_its_manifest_is_refused(bundle: Path) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    content["graphs"]["decoder"]["inputs"][3]["name"] = "past_keys.0"
    content["graphs"]["decoder"]["cache"][0]["past"] = "past_keys.0"
    path.write_text(json.dumps(content))
    with pytest.raises(VL2Error, match=r"past_key\.0 is \('float32', 4\) in the graph, None in the manifest"):
        OrtBackend(bundle, read_manifest(bundle), BundleOptions(device="cpu")).load("decoder")


def test_a_failing_run_is_an_error_of_the_user(backend: OrtBackend) -> None:
    feeds, results = decoder_arrays(4, 2)
    feeds["attention_mask"] = np.ones((1, 5), bool)
    with pytest.raises(VL2Error, match="onnxruntime failed in the graph decoder") as error:
        backend.run("decoder", feeds, results)
    assert error.value.hint


@pytest.fixture
def broken_cuda(monkeypatch) -> None:
    """An onnxruntime that offers CUDA and then has to do without, as with missing libraries."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_that_does_not_work_is_said_and_the_cpu_answers(shared_bundle: Path, broken_cuda, capfd) -> None:
    model = open_bundle(shared_bundle)
    assert "not CUDA: onnxruntime-gpu found no working CUDA and cuDNN libraries)" in model.backend
    assert model.ask("hello", options=GenerationOptions(3, ignore_eos=True)).token_ids
    assert capfd.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_that_was_demanded_and_does_not_work_is_an_error(shared_bundle: Path, broken_cuda) -> None:
    with pytest.raises(VL2Error, match="no working CUDA") as error:
        open_bundle(shared_bundle, BundleOptions(device="cuda")).ask("hello")
    assert "pip install" in error.value.hint


_LOAD = """
import sys
from vl2.manifest import Graph
from vl2.runtime import BundleOptions
from vl2.runtime.ort import OrtBackend
from pathlib import Path

def own_bytes():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

class Manifest:
    lowering = "portable"
    graphs = {"decoder": Graph("half.onnx", "half.data", (), ())}

OrtBackend._check_device = lambda *_: None
backend = OrtBackend(Path(sys.argv[1]), Manifest, BundleOptions(device="cpu", threads=1))
import vl2.runtime.ort
vl2.runtime.ort._check_ports = lambda *_: None
before = own_bytes()
backend.load("decoder")
print(own_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="own memory is read from /proc")
def test_float16_weights_stay_in_the_memory_map_when_a_graph_is_loaded(tmp_path: Path) -> None:
    weight = np.zeros((8192, 2048), np.float16)
    proto = small_graph(
        "half", [helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
                 helper.make_node("Gemm", ["x", "wide"], ["y"], transB=1)], {"w": weight},
        [("x", TensorProto.FLOAT, ["tokens", 2048])], [("y", TensorProto.FLOAT, ["tokens", 8192])])
    save_graph(tmp_path, proto)
    done = subprocess.run([sys.executable, "-c", _LOAD, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < weight.nbytes / 2


def test_a_lowering_that_is_not_known_is_refused_before_a_graph_is_loaded(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lowering": "npu"}))
    with pytest.raises(VL2Error, match="lowering 'npu', this vl2 runs portable, ort, cpu"):
        open_bundle(bundle)


def test_cuda_is_refused_for_operators_of_the_cpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lowering": "cpu"}))
    with pytest.raises(VL2Error, match="CUDA was asked for, and .* has the lowering `cpu`"):
        open_bundle(bundle, BundleOptions(device="cuda"))
    assert open_bundle(bundle, BundleOptions(device="auto")).backend.startswith("CPU")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    assert "not CUDA: the bundle has the lowering cpu" in open_bundle(bundle, BundleOptions(device="auto")).backend

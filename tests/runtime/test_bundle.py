"""Every bad bundle is refused with a clear error before a weight is read."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runtime.small_bundle import save_tensors
from vl2.errors import VL2Error
from vl2.manifest import file_facts
from vl2.runtime import BundleOptions, open_bundle, ort

IMAGE = Image.effect_noise((60, 40), 90)


@pytest.fixture(autouse=True)
def no_weight_is_read(request, monkeypatch) -> list:
    """Records which graphs were loaded; tests of refusals find it empty."""
    loaded, load = [], ort.OrtBackend._load
    monkeypatch.setattr(ort.OrtBackend, "_load", lambda self, graph: loaded.append(graph.file) or load(self, graph))
    return loaded


def edit(bundle: Path, change) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refresh(bundle: Path, name: str) -> None:
    """Makes the manifest agree with a file that a test has changed."""
    facts = file_facts(bundle / name)
    edit(bundle, lambda content: content["files"].update({name: vars(facts)}))


def refusal(bundle: Path, loaded: list, **options) -> VL2Error:
    with pytest.raises(VL2Error) as error:
        open_bundle(bundle, BundleOptions(**options))
    assert error.value.hint and loaded == []
    return error.value


def test_three_lines_give_an_answer(bundle: Path) -> None:
    model = open_bundle(bundle)
    answer = model.ask("What is shown?", images=[IMAGE])
    assert answer.prompt_tokens > 100 and answer.token_ids


def test_a_tile_budget_shortens_the_prompt_of_a_large_image_and_of_no_small_one(bundle: Path) -> None:
    tokens = {limit: [open_bundle(bundle, BundleOptions(max_tiles=limit)).ask("What?", images=[image]).prompt_tokens
                      for image in (IMAGE, IMAGE.resize((20, 20)))] for limit in (None, 4, 1)}
    # 2 × 2 tiles of 4 × 4 tokens, a newline token a row, against one tile
    assert tokens[None] == tokens[4]
    assert [large - small for large, small in (tokens[None], tokens[1])] == [2 * 4 * (2 * 4 + 1) - 4 * (4 + 1), 0]


def test_a_text_question_never_loads_the_vision_graph(bundle: Path, no_weight_is_read: list) -> None:
    model = open_bundle(bundle)
    first = model.ask("hello")
    assert no_weight_is_read == ["decoder.onnx"]
    assert first.load_ms > 1 > model.ask("hello").load_ms


@pytest.mark.parametrize("name", ["decoder.data", "vision.onnx", "embeddings.safetensors", "tokenizer.json",
                                  "processor_config.json"])
def test_a_missing_file_is_refused(bundle: Path, no_weight_is_read: list, name: str) -> None:
    (bundle / name).unlink()
    assert f"{name} is missing" in refusal(bundle, no_weight_is_read).message


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["decoder.data", "vision.onnx", "embeddings.safetensors", "tokenizer.json"])
def test_a_flipped_bit_is_refused(bundle: Path, no_weight_is_read: list, name: str) -> None:
    flip(bundle / name)
    assert "content was changed" in refusal(bundle, no_weight_is_read).message


def test_hashes_are_skipped_only_when_asked_and_sizes_never(bundle: Path, no_weight_is_read: list) -> None:
    flip(bundle / "decoder.data")
    open_bundle(bundle, BundleOptions(check_hashes=False))
    with (bundle / "decoder.data").open("ab") as stream:
        stream.write(b"x")
    assert "bytes, expected" in refusal(bundle, no_weight_is_read, check_hashes=False).message


def test_a_newer_schema_is_refused(bundle: Path, no_weight_is_read: list) -> None:
    edit(bundle, lambda content: content.update(schema_version=3))
    assert "this vl2 reads up to 2" in refusal(bundle, no_weight_is_read).message


def test_too_little_memory_is_refused_before_hashing_unless_asked_not_to(bundle: Path, no_weight_is_read: list,
                                                                         monkeypatch) -> None:
    monkeypatch.setattr("vl2.memory.available_bytes", lambda: 1000.0)
    monkeypatch.setattr("vl2.runtime.bundle.check_files", lambda *_: pytest.fail("hashed"))
    assert "of memory, 0.00 GB are available" in refusal(bundle, no_weight_is_read).message
    open_bundle(bundle, BundleOptions(check_memory=False, check_hashes=False))


def test_enough_memory_is_the_size_of_the_graphs_weights(bundle: Path, monkeypatch) -> None:
    needed = sum((bundle / name).stat().st_size for name in ("decoder.data", "vision.data"))
    monkeypatch.setattr("vl2.memory.available_bytes", lambda: float(needed))
    open_bundle(bundle)
    monkeypatch.setattr("vl2.memory.available_bytes", lambda: needed - 1.0)
    with pytest.raises(VL2Error, match="loading the weights of"):
        open_bundle(bundle)
    monkeypatch.setattr("vl2.memory.available_bytes", lambda: math.inf)
    open_bundle(bundle)


@pytest.mark.parametrize("change, message", [
    (lambda content: content["graphs"].pop("vision"), "no graph 'vision'"),
    (lambda content: content["graphs"]["decoder"]["inputs"][0].update(name="embeds"), "inputs of the graph decoder"),
    (lambda content: content["graphs"]["decoder"]["outputs"][0].update(shape=["batch", 641]), "logits is .*640"),
    (lambda content: content["graphs"]["vision"]["inputs"][0].update(dtype="float16"), "tiles is float16"),
    (lambda content: content["graphs"]["decoder"].update(cache=[]), "inputs of the graph decoder"),
    (lambda content: content["graphs"]["decoder"]["inputs"][3].update(shape=["batch", "past", 2, 16]), "new_key.0"),
    (lambda content: content["graphs"]["decoder"]["inputs"][3].update(shape=["batch", "past", "n", 16]), "past_key.0"),
    (lambda content: content["tokens"].update(image_id=619), "image_id is 620 in the processor's files, 619"),
    (lambda content: content["image"].update(patch_size=8), "image geometry"),
    (lambda content: content["image"].update(tokens_per_side=5), "image_features"),
])
def test_a_manifest_that_contradicts_the_runtime_or_the_processor_is_refused(bundle: Path, no_weight_is_read: list,
                                                                            change, message: str) -> None:
    edit(bundle, change)
    with pytest.raises(VL2Error, match=message):
        open_bundle(bundle)
    assert no_weight_is_read == []


def test_a_tokenizer_of_another_model_is_refused(bundle: Path, no_weight_is_read: list) -> None:
    path = bundle / "tokenizer.json"
    content = json.loads(path.read_text())
    last = content["added_tokens"][-1]
    content["added_tokens"] += [{**last, "id": last["id"] + more, "content": f"<{more}>"} for more in range(1, 20)]
    path.write_text(json.dumps(content))
    refresh(bundle, "tokenizer.json")
    assert "the tokenizer has id 646, the model 640 ids" in refusal(bundle, no_weight_is_read).message


def test_embeddings_that_do_not_fit_are_refused(bundle: Path, no_weight_is_read: list) -> None:
    save_tensors(bundle / "embeddings.safetensors", {"embed_tokens": np.zeros((640, 15), np.float32)})
    refresh(bundle, "embeddings.safetensors")
    assert "embed_tokens is F32 [640, 15], expected [640, 16]" in refusal(bundle, no_weight_is_read).message


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VL2Error, match="not a bundle"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("options", [dict(device="tpu"), dict(threads=0), dict(max_tiles=0)])
def test_an_impossible_option_is_refused(options: dict) -> None:
    with pytest.raises(VL2Error, match="expected"):
        BundleOptions(**options)


def test_cuda_is_refused_where_it_is_not(bundle: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is here")
    with pytest.raises(VL2Error, match="CUDA was asked for"):
        open_bundle(bundle, BundleOptions(device="cuda"))

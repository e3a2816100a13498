"""The exported graphs against the recorded outputs of the original implementation, in every scheme.

The goldens' weights are exact in bfloat16 and, but for underflow, in float16: both schemes must give the same answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.tolerances import ONNX_RUNTIME, assert_close
from vl2.export.session import GraphSession
from vl2.manifest import read_manifest
from vl2.prompt import Message, Processor

STEPS = 24


@dataclass(frozen=True)
class Exported:
    """Sessions of a bundle and the recordings of its checkpoint."""

    folder: Path
    vision: GraphSession
    decoder: GraphSession
    table: np.ndarray
    recorded: dict[str, np.ndarray]
    generated: dict[str, np.ndarray]

    def empty_cache(self, batch: int) -> list[np.ndarray]:
        graph = read_manifest(self.folder).graphs["decoder"]
        past = {ports.past for ports in graph.cache}
        return [np.zeros((batch, 0, *port.shape[2:]), np.float32) for port in graph.inputs if port.name in past]


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def exported(request: pytest.FixtureRequest, mini_folder: Path, bundle_of) -> Exported:
    bundle, golden = bundle_of(mini_folder, request.param), mini_folder / "golden"
    manifest = read_manifest(bundle)
    table = load_file(bundle / "embeddings.safetensors")["embed_tokens"].astype(np.float32)
    arrays = [dict(np.load(golden / f"{name}.npz")) for name in ("model", "generation")]
    return Exported(bundle, *(GraphSession(bundle, manifest, name) for name in ("vision", "decoder")), table, *arrays)


def test_image_features_equal_the_originals(exported: Exported, mini_folder: Path) -> None:
    facts = json.loads((mini_folder / "golden" / "model.json").read_text())["vision"]
    image = mini_folder.parent / "images" / f"{facts['image']}.png"
    prompt = Processor.from_folder(mini_folder).encode(
        [Message("user", "<image>", [image]), Message("assistant", "")]
    )
    features = exported.vision.run([prompt.tiles])[0]
    recorded = exported.recorded
    assert_close(features[0], recorded["projector/out_tile0"], ONNX_RUNTIME)
    assert_close(features[:, recorded["projector/rows"]], recorded["projector/out_rows"], ONNX_RUNTIME)


@pytest.mark.parametrize("chunk", [1000, 97])
def test_logits_of_an_image_prompt_equal_the_originals(exported: Exported, chunk: int) -> None:
    logits, _ = exported.decoder.prefill(exported.recorded["one/inputs_embeds"][0], chunk)
    assert_close(logits[0], exported.recorded["one/logits_last"][0, -1], ONNX_RUNTIME)


def test_a_prompt_token_by_token_equals_the_originals_last_positions(exported: Exported) -> None:
    embeds, wanted = exported.recorded["text/inputs_embeds"][0], exported.recorded["text/logits_last"][0]
    cache = exported.empty_cache(1)
    for position, row in enumerate(embeds):
        logits, cache = exported.decoder.step(row[None], position, cache)
        if position >= len(embeds) - len(wanted):
            assert_close(logits[0], wanted[position - len(embeds)], ONNX_RUNTIME, f"position {position}")


@pytest.mark.parametrize("case", ["one", "text"])
def test_greedy_tokens_equal_the_originals(exported: Exported, case: str) -> None:
    embeds, wanted = exported.recorded[f"{case}/inputs_embeds"][0], exported.generated[f"{case}/ids"][0]
    logits, cache = exported.decoder.prefill(embeds, 1000)
    tokens = [int(logits.argmax())]
    while len(tokens) < STEPS:
        row = exported.table[tokens[-1:]]
        logits, cache = exported.decoder.step(row, len(embeds) + len(tokens) - 1, cache)
        tokens.append(int(logits.argmax()))
    assert tokens == wanted.tolist()


def test_a_left_padded_batch_equals_the_originals(exported: Exported) -> None:
    recorded = exported.recorded
    mask, positions = recorded["batch/attention_mask"].astype(bool), recorded["batch/position_ids"].astype(np.int64)
    embeds = np.stack((recorded["one/inputs_embeds"][0], exported.table[recorded["batch/input_ids"][1]]))
    split = mask.shape[1] - 5
    cache = exported.empty_cache(len(mask))
    for part in (slice(0, split), slice(split, None)):
        end = mask[:, : part.stop].shape[1]
        logits, *new = exported.decoder.run([embeds[:, part], positions[:, part], mask[:, :end], *cache])
        cache = [np.concatenate(pair, axis=1) for pair in zip(cache, new, strict=True)]
    assert_close(logits, recorded["batch/logits_last"][:, -1], ONNX_RUNTIME)


def test_the_cache_is_the_originals(exported: Exported, mini_folder: Path) -> None:
    _, cache = exported.decoder.prefill(exported.recorded["text/inputs_embeds"][0], 1000)
    language = read_manifest(exported.folder).language
    for l in range(language.num_hidden_layers):
        first, second = (exported.recorded[f"text/cache{i}_last4.{l}"][0] for i in (0, 1))
        if language.attention == "mla":
            wanted = [np.concatenate((second[0], first[0]), axis=-1)]  # latent, then rope key
        else:
            wanted = [first.transpose(1, 0, 2), second.transpose(1, 0, 2)]
        for got, want in zip(cache[l * len(wanted) :], wanted, strict=False):
            assert_close(got[0, -4:], want, ONNX_RUNTIME, f"layer {l}")

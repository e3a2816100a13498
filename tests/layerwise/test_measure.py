"""Streamed layer figures equal those of two whole models with hooks, for every attention and router of the family."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.layerwise import direct
from tests.layerwise.conftest import Measured
from tests.tolerances import LAYER_COSINE, LAYER_ERROR
from vl2.prompt import Processor


class Truth:
    """Both models and what passed them."""

    def __init__(self, measured: Measured):
        processor = Processor.from_folder(measured.reference)
        self.a, self.b = direct.whole_model(measured.reference), direct.whole_model(measured.quantized)
        self.mine, self.theirs = (direct.trace(model, processor, measured.data) for model in (self.a, self.b))
        self.image = np.concatenate(self.mine.image)

    def own(self, name: str) -> np.ndarray:
        """What the quantized module gives for the reference's inputs."""
        return direct.again(self.b, name, self.mine.calls[name])


@pytest.fixture(scope="module")
def truth(measured: Measured) -> Truth:
    return Truth(measured)


def assert_equal(found: dict[str, Any], y: np.ndarray, z: np.ndarray) -> None:
    expected = direct.figures(y, z)
    assert found["positions"] == expected["positions"]
    assert found["error"] == pytest.approx(expected["error"], rel=LAYER_ERROR)
    assert found["cosine"] == pytest.approx(expected["cosine"], abs=LAYER_COSINE)
    decibels = None if found["error"] == 0 else pytest.approx(-10 * np.log10(found["error"]))
    assert found["sqnr_db"] == decibels


def assert_by_modality(found: dict[str, Any], y: np.ndarray, z: np.ndarray, image: np.ndarray) -> None:
    assert_equal(found["all"], y, z)
    assert_equal(found["text"], y[~image], z[~image])
    assert_equal(found["image"], y[image], z[image])


def test_blocks_of_the_decoder_equal_those_of_whole_models(measured: Measured, truth: Truth) -> None:
    blocks = {row["block"]: row for row in measured.report["blocks"]}
    for l in range(len(truth.a.language.layers)):
        layer = f"language.layers.{l}"
        # the second norm reads what the attention left, the layer gives what the mlp left
        places = {"attention": (f"{layer}.self_attn", f"{layer}.post_attention_layernorm", "inputs", "input_layernorm"),
                  "mlp": (f"{layer}.mlp", layer, "outputs", "post_attention_layernorm")}
        for part, (module, behind, side, norm) in places.items():
            y, z = (np.concatenate(getattr(traced, side)[behind]) for traced in (truth.mine, truth.theirs))
            assert_by_modality(blocks[f"layers.{l}.{part}"]["stream"], y, z, truth.image)
            calls = truth.mine.calls[f"{layer}.{norm}"]
            inputs = [truth.b.get_submodule(f"{layer}.{norm}")(*args) for args in calls]
            rest = [args[1:] for args in truth.mine.calls[module]]
            own = direct.again(truth.b, module, [(x, *more) for x, more in zip(inputs, rest, strict=True)])
            assert_by_modality(blocks[f"layers.{l}.{part}"]["own"], truth.mine.leaving(module), own, truth.image)


def test_tower_projector_embeddings_and_logits_equal_those_of_whole_models(measured: Measured, truth: Truth) -> None:
    blocks = {row["block"]: row for row in measured.report["blocks"]}
    for i in range(len(truth.a.vision.blocks)):
        name = f"vision.blocks.{i}"
        x, y = truth.mine.entering(name), truth.mine.leaving(name)
        assert blocks[name]["own"]["text"] is None
        assert_equal(blocks[name]["own"]["image"], y - x, truth.own(name) - x)
        assert_equal(blocks[name]["stream"]["image"], y, truth.theirs.leaving(name))
    projector = blocks["projector"]
    assert_equal(projector["stream"]["all"], truth.mine.leaving("projector"), truth.theirs.leaving("projector"))
    assert_equal(projector["own"]["all"], truth.mine.leaving("projector"), truth.own("projector"))
    for block, name in {"embeddings": "embeddings", "norm": "language.norm", "logits": "language.lm_head"}.items():
        y, z = truth.mine.leaving(name), truth.theirs.leaving(name)
        assert_by_modality(blocks[block]["stream"], y, z, truth.image)


def test_routers_change_as_in_whole_models(measured: Measured, truth: Truth) -> None:
    routers = {row["layer"]: row for row in measured.report["routers"]}
    assert routers.keys() == truth.mine.chosen.keys()
    for l, row in routers.items():
        expected = direct.changed_percent(truth.mine.chosen[l], truth.theirs.chosen[l])
        assert row["all"]["changed_percent"] == pytest.approx(expected)
        assert row["all"]["positions"] == len(truth.image) and row["image"]["positions"] == truth.image.sum()
        assert row["all"]["own_percent"] == 0, "no recipe quantizes a router"
    assert sum(row["all"]["changed_percent"] for row in routers.values()) > 0


def test_matrices_equal_those_of_whole_models(measured: Measured, truth: Truth) -> None:
    matrices = {row["tensor"]: row for row in measured.report["matrices"]}
    linears = [name for name in truth.mine.outputs if (name.replace("language.", "language.model.", 1)
               if name.startswith("language.layers") else name) in matrices]
    assert len(linears) > 20
    for name in linears:
        row = matrices[name.replace("language.", "language.model.", 1) if name.startswith("language.layers") else name]
        w, v = (model.get_submodule(name).weight.detach().double().numpy() for model in (truth.a, truth.b))
        x = truth.mine.entering(name)
        assert_equal(row["output"]["all"], x @ w.T, x @ v.T)
        assert row["weights"]["error"] == pytest.approx(((v - w) ** 2).sum() / (w**2).sum(), rel=LAYER_ERROR)
        cosine = (w * v).sum() / np.sqrt((w**2).sum() * (v**2).sum())
        assert row["weights"]["cosine"] == pytest.approx(cosine, abs=LAYER_COSINE)


def test_experts_equal_those_of_whole_models(measured: Measured, truth: Truth) -> None:
    matrices = {row["tensor"]: row for row in measured.report["matrices"]}
    l = len(truth.a.language.layers) - 1
    for e in (0, 3):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            found = matrices[f"language.model.layers.{l}.mlp.experts.{e}.{matrix}"]["output"]["all"]
            expected = direct.expert_figures(truth.a, truth.b, truth.mine, (l, e, matrix))
            assert found["positions"] == expected["positions"] > 0
            assert found["error"] == pytest.approx(expected["error"], rel=LAYER_ERROR)
            assert found["cosine"] == pytest.approx(expected["cosine"], abs=LAYER_COSINE)


def test_distributions_equal_those_of_whole_models(measured: Measured, truth: Truth) -> None:
    y, z = (traced.leaving("language.lm_head") for traced in (truth.mine, truth.theirs))
    log_p, log_q = (x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
                    for x in (y, z))
    kld = (np.exp(log_p) * (log_p - log_q)).sum(1)
    logits = measured.report["logits"]
    image = logits["image"]
    assert image["positions"] == truth.image.sum()
    assert image["kld"]["mean"] == pytest.approx(kld[truth.image].mean(), rel=LAYER_ERROR)
    assert image["kld"]["max"] == pytest.approx(kld[truth.image].max(), rel=LAYER_ERROR)
    same = (y.argmax(1) == z.argmax(1))[truth.image]
    assert image["same_top1_percent"]["mean"] == pytest.approx(100 * same.mean())
    text, answer = logits["text"], logits["answer"]
    assert text["positions"] + answer["positions"] == (~truth.image).sum()
    total = text["positions"] * text["kld"]["mean"] + answer["positions"] * answer["kld"]["mean"]
    assert total == pytest.approx(kld[~truth.image].sum(), rel=LAYER_ERROR)


def test_the_report_is_json_without_nan(measured: Measured) -> None:
    assert json.loads(json.dumps(measured.report, allow_nan=False)) == measured.report

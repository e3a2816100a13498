"""What optimum finds of us, in an environment that has it; and what is said where it is not."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from vl2.config import load_config
from vl2.errors import VL2Error

FIND = {"exporter": "onnx", "model_type": "deepseek_vl_v2", "task": "image-text-to-text",
        "library_name": "transformers"}  # fmt: skip


@pytest.fixture(scope="module")
def constructor():
    tasks = pytest.importorskip("optimum.exporters.tasks", reason="optimum, or requests for it, is not installed")
    import vl2.export.optimum_config  # noqa: F401, importing it registers

    return tasks.TasksManager.get_exporter_config_constructor(**FIND)


@pytest.mark.parametrize("name", ["tiny-mini", "base-mini"])
def test_optimum_finds_the_decoders_ports_by_model_type_and_task(constructor, goldens: Path, name: str) -> None:
    config = load_config(goldens / name)
    found = constructor(config)
    assert (type(found).__name__, found.task) == ("VL2OnnxConfig", "image-text-to-text")
    assert found.inputs["inputs_embeds"] == {0: "batch", 1: "tokens"}
    assert found.inputs["attention_mask"] == {0: "batch", 1: "total"}
    assert found.outputs["logits"] == {0: "batch"}
    entries = {"latent"} if config.language_config.use_mla else {"key", "value"}
    caches = {f"{entry}.{l}" for entry in entries for l in range(config.language_config.num_hidden_layers)}
    assert {key.removeprefix("past_") for key in found.inputs if key.startswith("past_")} == caches
    assert found.outputs.keys() == {"logits"} | {f"new_{cache}" for cache in caches}


def test_a_configuration_that_was_not_checked_is_refused(constructor) -> None:
    with pytest.raises(VL2Error, match="dict.*ModelConfig"):
        constructor({"model_type": "deepseek_vl_v2"})


def test_optimum_is_sent_to_our_own_export(constructor, goldens: Path) -> None:
    with pytest.raises(VL2Error) as refused:
        constructor(load_config(goldens / "tiny-mini")).generate_dummy_inputs()
    assert "vl2 export" in refused.value.hint


def test_without_optimum_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vl2.export.optimum_config", raising=False)
    monkeypatch.setitem(sys.modules, "optimum.exporters.base", None)
    with pytest.raises(VL2Error) as refused:
        importlib.import_module("vl2.export.optimum_config")
    assert "'.[optimum]'" in refused.value.hint

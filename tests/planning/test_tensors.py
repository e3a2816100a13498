"""The torch-free table of tensors against the published lists and against the model itself."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import GOLDENS, MINI_CHECKPOINTS, NANO
from vl2.config import ModelConfig, load_config
from vl2.modules import module_of
from vl2.planning.models import NAMES, planned_model
from vl2.planning.tensors import model_tensors


def by_module(tensors: dict[str, tuple[int, ...]]) -> dict[str, Counter]:
    """Module → shapes with their counts; the unused pooling head left out."""
    counted: dict[str, Counter] = {}
    for name, shape in tensors.items():
        counted.setdefault(module_of(name), Counter())[tuple(shape)] += 1
    counted.pop("vision_pooling_head", None)
    return counted


def planned_by_module(config: ModelConfig) -> dict[str, Counter]:
    counted: dict[str, Counter] = {}
    for tensor in model_tensors(config):
        counted.setdefault(tensor.module, Counter())[tensor.shape] += tensor.copies
    return counted


@pytest.mark.parametrize("variant", NAMES)
def test_the_shipped_configurations_give_every_published_tensor(variant: str) -> None:
    config = planned_model(variant).config
    published = GOLDENS / "published"
    assert config == ModelConfig.from_dict(json.loads((published / f"{variant}.config.json").read_text()))
    assert planned_by_module(config) == by_module(json.loads((published / f"{variant}.tensors.json").read_text()))


@pytest.mark.parametrize("folder", [*(GOLDENS / name for name in MINI_CHECKPOINTS), NANO], ids=lambda path: path.name)
def test_the_tensors_are_those_of_the_model(folder: Path) -> None:
    from vl2.model.checkpoint import expected_tensors

    config = load_config(folder)
    assert planned_by_module(config) == by_module(expected_tensors(config))


def test_a_projector_with_more_layers_and_attention_with_every_option_are_counted_too() -> None:
    from vl2.model.checkpoint import expected_tensors

    values = json.loads((GOLDENS / "small-mini" / "config.json").read_text())
    values["projector_config"] |= {"depth": 4, "mlp_ratio": 2}
    values["language_config"] |= {"q_lora_rank": 24, "attention_bias": True, "n_shared_experts": None}
    latent = ModelConfig.from_dict(values)
    values["language_config"] |= {"use_mla": False, "num_key_value_heads": 1}
    for config in (latent, ModelConfig.from_dict(values)):
        assert planned_by_module(config) == by_module(expected_tensors(config))


def test_a_decode_step_reads_the_chosen_experts_and_no_image_part() -> None:
    read: Counter = Counter()
    for tensor in planned_model("tiny").tensors:
        read[tensor.module] += tensor.parameters * tensor.share
    # shared/guide/cpu.md, section 2: 573 M weights a token
    assert math.isclose(sum(read.values()), 573e6, rel_tol=0.01)
    assert read["vision"] == read["projector"] == read["embed_tokens"] == 0

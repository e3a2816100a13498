from __future__ import annotations

import json
from pathlib import Path

import pytest

from vl2.config import ModelConfig, load_config
from vl2.quant.plan import planned_sizes
from vl2.quant.quantizer import QuantizeOptions, quantize_checkpoint
from vl2.quant.recipe import OuterParts, assign_schemes, builtin_recipe

ALL_INT8 = OuterParts(vision="int8", lm_head="int8", embeddings="int8")


def test_planned_sizes_are_those_of_the_files(goldens: Path, tmp_path: Path) -> None:
    out = quantize_checkpoint(goldens / "base-mini", tmp_path / "out", QuantizeOptions(outer=ALL_INT8, method="rtn"))
    config = load_config(goldens / "base-mini")
    schemes = assign_schemes(builtin_recipe("int4", config, ALL_INT8), config)
    assert planned_sizes(config, schemes) == json.loads((out / "quantization.json").read_text())["modules"]


@pytest.mark.parametrize("recipe, outer, most_gigabytes", [
    ("int4", ALL_INT8, 2.4), ("int4", OuterParts(), 3.1), ("int8", OuterParts(vision="int8", lm_head="int8"), 3.9),
])  # fmt: skip
def test_published_tiny_fits_the_promised_sizes(goldens: Path, recipe: str, outer, most_gigabytes: float) -> None:
    config = ModelConfig.from_dict(json.loads((goldens / "published" / "tiny.config.json").read_text()))
    sizes = planned_sizes(config, assign_schemes(builtin_recipe(recipe, config, outer), config))
    used = {module: size for module, size in sizes.items() if module != "vision_pooling_head"}
    assert sum(used.values()) <= most_gigabytes * 1e9

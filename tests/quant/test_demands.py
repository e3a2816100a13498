"""What quantizing is said to need: within the promises for the published models, and growing where it must."""

from __future__ import annotations

import pytest

from tests.conftest import GOLDENS
from vl2.config import ModelConfig
from vl2.json_file import read_json
from vl2.quant.demands import layer_work, peak_bytes
from vl2.quant.method import METHODS
from vl2.quant.recipe import OuterParts, assign_schemes, builtin_recipe
from vl2.quant.scheme import Scheme

INT8 = OuterParts("int8", "int8", "int8")


def published(name: str, outer: OuterParts) -> tuple[ModelConfig, dict[str, Scheme | None]]:
    config = ModelConfig.from_dict(read_json(GOLDENS / "published" / f"{name}.config.json"))
    return config, assign_schemes(builtin_recipe("int4", config, outer), config)


@pytest.mark.parametrize("outer", [OuterParts(), INT8])
def test_the_published_tiny_fits_four_gigabytes_with_all_that_goes_with_it(outer: OuterParts) -> None:
    config, schemes = published("tiny", outer)
    assert all(peak_bytes(config, schemes, method) < 2.4e9 for method in METHODS.values())


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_methods_that_do_more_need_more(name: str) -> None:
    config, schemes = published(name, INT8)
    order = [METHODS[method] for method in ("rtn", "search", "gptq+search", "awq+gptq")]
    work = [layer_work(config, schemes, method) for method in order]
    assert work == sorted(work) and work[0] > 0
    assert peak_bytes(config, schemes, order[0]) <= peak_bytes(config, schemes, order[-1])

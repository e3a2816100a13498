"""The tower's matrices by what calibration measured at them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vl2.quant.linears import matrices
from vl2.quant.method import METHODS
from vl2.quant.objective import output_error
from vl2.quant.recipe import OuterParts, assign_schemes, builtin_recipe
from vl2.quant.shard import write_shard
from vl2.quant.source import Source
from vl2.quant.stage import PartResult, quantize_plain
from vl2.quant.tower import TowerStatistics

MEASURED, OTHER = "vision.blocks.0.mlp.fc2", "vision.blocks.1.mlp.fc2"


def write_site(folder: Path, name: str, site: str, size: int) -> None:
    """A site of which every eighth input is 30 times as loud as the others."""
    loud = torch.ones(size)
    loud[::8] = 30.0
    write_shard(folder / f"{name}.safetensors", {
        f"{site}.hessian_diag": loud.square(), f"{site}.abs_mean": loud, f"{site}.tokens": torch.tensor([0, 64])})


@pytest.fixture(scope="module")
def source(goldens: Path) -> Source:
    return Source(goldens / "tiny-mini")


@pytest.fixture
def calibration(source: Source, tmp_path: Path) -> Path:
    write_site(tmp_path, "vision_0", "mlp.down", matrices(source.config)[MEASURED][1])
    return tmp_path


def quantized(source: Source, method: str, tower: TowerStatistics | None) -> PartResult:
    schemes = assign_schemes(builtin_recipe("int8", source.config, OuterParts(vision="int8")), source.config)
    wanted = {module: schemes[module] for module in (MEASURED, OTHER)}
    return quantize_plain(source, wanted, METHODS[method], lambda module: None, tower)


@pytest.mark.parametrize("method", ["search", "awq+gptq"])
def test_scales_that_know_the_loud_inputs_lose_less_of_the_output(
    source: Source, calibration: Path, method: str
) -> None:
    tower = TowerStatistics(calibration)
    blind, seeing = quantized(source, method, None), quantized(source, method, tower)
    weight, importance = source.weight(MEASURED), tower.of(MEASURED).importance
    errors = [output_error(weight, made.quantized[MEASURED].dequantize(), importance) for made in (blind, seeing)]
    assert errors[1] < 0.99 * errors[0]
    same = [made.quantized[OTHER] for made in (blind, seeing)]
    assert torch.equal(same[0].codes, same[1].codes), "what was not measured is as before"
    assert [report.tokens for report in seeing.reports] == [64, 0]


def test_a_diagonal_gives_the_error_of_the_whole_matrix(source: Source, calibration: Path) -> None:
    weight, importance = source.weight(MEASURED), TowerStatistics(calibration).of(MEASURED).importance
    whole, diagonal = (output_error(weight, weight * 0.9, one) for one in (torch.diag(importance), importance))
    assert diagonal == pytest.approx(whole, rel=1e-5)


def test_sites_without_rows_and_modules_without_files_have_no_statistics(tmp_path: Path) -> None:
    write_shard(tmp_path / "projector.safetensors", {
        "layers.0.hessian_diag": torch.zeros(4), "layers.0.abs_mean": torch.zeros(4),
        "layers.0.tokens": torch.tensor([0, 0])})
    tower = TowerStatistics(tmp_path)
    for module in ("projector.layers.0", "vision.blocks.3.attn.qkv", "vision.patch_embed.proj", "vision.blocks.3.x"):
        assert tower.of(module) is None

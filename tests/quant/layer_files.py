"""Statistics files of calibration's format, and dequantized tensors put into a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tests.quant.synthetic import random_inputs, statistics_of
from vl2.config import ModelConfig
from vl2.model.checkpoint import parameter_sources
from vl2.model.vl2 import DeepseekVL2
from vl2.quant.linears import matrices
from vl2.quant.shard import write_shard
from vl2.quant.sites import layer_units


def site_inputs(config: ModelConfig, layer: int, stage: str) -> dict[str, int]:
    """K of every site that calibration writes for a stage."""
    shapes = matrices(config)
    units = layer_units(config.language_config, layer, stage)
    sites = {site.name: shapes[site.consumers[0]][1] for unit in units for site in unit.sites}
    return sites | ({"mlp.input": config.language_config.hidden_size} if stage == "mlp" else {})


def write_statistics(path: Path, config: ModelConfig, place: tuple[int, str], tokens: Mapping[str, int]) -> Path:
    """Statistics of random inputs with loud channels; place: layer and stage; tokens: by site, else 300."""
    torch.manual_seed(place[0])
    tensors: dict[str, Tensor] = {}
    for site, size in site_inputs(config, *place).items():
        made = statistics_of(random_inputs(tokens.get(site, 300), size, 0.03, 10.0))
        tensors[f"{site}.hessian"] = made.hessian
        tensors[f"{site}.abs_mean"] = made.abs_mean
        tensors[f"{site}.tokens"] = torch.tensor([made.tokens // 2, made.tokens - made.tokens // 2])
    write_shard(path, tensors)
    return path


def put_into(model: DeepseekVL2, tensors: Mapping[str, Tensor]) -> None:
    """Overwrites the model's parameters, or rows of stacked ones, by the checkpoint's names."""
    with torch.no_grad():
        for name, sources in parameter_sources(model.config).items():
            parameter = model.get_parameter(name)
            for row, source in enumerate(sources):
                if source in tensors:
                    target = parameter[row] if parameter.dim() > tensors[source].dim() else parameter
                    target.copy_(tensors[source])

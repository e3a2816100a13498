"""What calibration measured at the Linears of the vision tower and the projector: sizes of inputs, no correlations."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from vl2.quant.statistics import LayerStatistics, Statistics

# A block's Linear → the site of its input in `vision_{i}.safetensors`.
_BLOCK_SITES = {"attn.qkv": "attention.input", "attn.proj": "attention.output", "mlp.fc1": "mlp.input",
                "mlp.fc2": "mlp.down"}
_BLOCK, _PROJECTOR = re.compile(r"vision\.blocks\.(\d+)\.(.+)"), re.compile(r"projector\.(layers\.\d+)")


class TowerStatistics:
    """The statistics that a calibration set holds, by module: the diagonal of the Hessian [K] alone."""

    def __init__(self, calibration: Path):
        self._folder = calibration

    def of(self, module: str) -> Statistics | None:
        """None for a module without: in a set without images, and where none was measured."""
        name, site = _place_of(module)
        path = self._folder / f"{name}.safetensors"
        if site is None or not path.is_file():
            return None
        found = LayerStatistics(path).site(site)
        return replace(found, hessian=found.importance) if found.tokens else None


def _place_of(module: str) -> tuple[str, str | None]:
    """File, without its suffix, and site."""
    if block := _BLOCK.fullmatch(module):
        return f"vision_{block[1]}", _BLOCK_SITES.get(block[2])
    layer = _PROJECTOR.fullmatch(module)
    return "projector", layer and layer[1]

"""What is read of the files for a block of a weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vl2.export import checkpoint as module
from vl2.export.checkpoint import open_checkpoint
from vl2.export.weights import Weight

STACK = "language.layers.1.mlp.experts.up_proj"


@pytest.mark.parametrize("start, count", [(0, 1), (3, 2), (11, 1)])
def test_a_block_of_experts_is_read_without_the_others(goldens: Path, monkeypatch, start: int, count: int) -> None:
    opened, asked, read = open_checkpoint(goldens / "tiny-mini"), [], module.read_tensor
    weight = Weight(STACK, opened.shapes[STACK])
    whole = opened.read(weight)
    monkeypatch.setattr(module, "read_tensor", lambda entry: asked.append(entry.name) or read(entry))
    block = opened.read(weight.then(("narrow", (0, start, count)), (count, *weight.shape[1:])))
    assert torch.equal(block, whole[start : start + count]) and len(asked) == count

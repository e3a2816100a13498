"""Copies of a miniature checkpoint with one thing changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vl2.config import load_config
from vl2.model.checkpoint import expected_tensors

FILES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def copy_checkpoint(source: Path, target: Path) -> Path:
    """A writable copy without the goldens."""
    target.mkdir()
    for path in [*source.glob("*.safetensors*"), *(source / name for name in FILES)]:
        shutil.copyfile(path, target / path.name)
    return target


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    """Rewrites the folder's single weight file with one tensor changed; returns that file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, path)
    return path


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def random_checkpoint(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A checkpoint with the files of `source`, a changed config.json and random weights that fit it."""
    copy_checkpoint(source, target)
    for path in target.glob("*.safetensors*"):
        path.unlink()
    change_config(target, change)
    shapes = expected_tensors(load_config(target))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        scale = 0.1 if len(shape) < 2 else 2 * shape[-1] ** -0.5
        tensors[name] = torch.randn(shape, generator=generator) * scale + name.endswith("norm.weight")
    save_file(tensors, target / "model.safetensors")
    return target

"""Copies of a miniature checkpoint with one thing changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

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

"""What a checkpoint is called where only its folder is known."""

from __future__ import annotations

from pathlib import Path


def checkpoint_name(folder: Path) -> str:
    """The hub id of a folder in the hub's cache, else the folder's name."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return folder.resolve().name

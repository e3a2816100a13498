"""What the user names as the checkpoint: a folder, or a model of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from vl2.errors import VL2Error

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What an export reads; pickled weights are not fetched.
_PATTERNS = ("*.json", "*.safetensors")


def resolve_source(name_or_path: str | Path, fetch: bool = True) -> Path:
    """The checkpoint folder: the path itself, or the hub's snapshot, fetched with progress, resumed where it broke off.

    fetch: whether a model that is not on this machine is fetched. Raises VL2Error for a folder that does not exist and
    for a model that is not to be fetched or cannot be.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise VL2Error(f"{path} is a file", f"give the folder that holds it: {path.parent}")
    if not _HUB_ID.fullmatch(str(name_or_path)):
        raise VL2Error(
            f"there is no folder {path}", "give a checkpoint folder, or a hub id such as deepseek-ai/deepseek-vl2-tiny"
        )
    return _fetch(str(name_or_path)) if fetch else _fetched(str(name_or_path))


def _fetched(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_PATTERNS), local_files_only=True))
    except Exception as error:  # as in _fetch
        raise VL2Error(f"`{hub_id}` is not on this machine, and a dry run fetches nothing",
                       f"`vl2 plan {hub_id}` needs no weights; or fetch it first: hf download {hub_id}") from error


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_PATTERNS)))
    except RepositoryNotFoundError as error:
        raise VL2Error(
            f"the hub has no model `{hub_id}` that you may read", "check the name; `hf auth login` opens gated models"
        ) from error
    # The hub client passes on the errors of an HTTP library that changes with its version.
    except Exception as error:
        raise VL2Error(
            f"`{hub_id}` could not be fetched: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
            "without network, give the folder of a downloaded copy: vl2-export /path/to/folder --out BUNDLE; "
            "an interrupted download goes on where it broke off",
        ) from error

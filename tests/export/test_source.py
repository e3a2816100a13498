"""What may be named as a checkpoint."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from vl2.checkpoint_name import checkpoint_name
from vl2.errors import VL2Error
from vl2.export import resolve_source


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_source(tmp_path) == tmp_path and checkpoint_name(tmp_path) == tmp_path.name


def test_a_file_is_refused_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(VL2Error, match="is a file") as caught:
        resolve_source(path)
    assert str(tmp_path) in caught.value.hint


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "/absolute/path", "./relative/x"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(name: str) -> None:
    with pytest.raises(VL2Error, match="there is no folder"):
        resolve_source(name)


def test_a_hub_id_gives_its_snapshot_and_keeps_its_name(tmp_path: Path, monkeypatch) -> None:
    snapshot = tmp_path / "models--deepseek-ai--deepseek-vl2-tiny" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    asked = {}

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked[hub_id] = allow_patterns
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_source("deepseek-ai/deepseek-vl2-tiny") == snapshot
    assert asked == {"deepseek-ai/deepseek-vl2-tiny": ["*.json", "*.safetensors"]}
    assert checkpoint_name(snapshot) == "deepseek-ai/deepseek-vl2-tiny"


def test_a_dry_run_takes_what_is_on_the_machine_and_fetches_nothing(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def download(hub_id: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        asked.append(local_files_only)
        if len(asked) > 1:
            raise LocalEntryNotFoundError("not here")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_source("deepseek-ai/deepseek-vl2-tiny", fetch=False) == tmp_path
    with pytest.raises(VL2Error, match="not on this machine, and a dry run fetches nothing") as caught:
        resolve_source("deepseek-ai/deepseek-vl2-tiny", fetch=False)
    assert asked == [True, True] and "vl2 plan deepseek-ai/deepseek-vl2-tiny" in caught.value.hint


def test_without_network_the_folder_form_is_named(monkeypatch) -> None:
    def download(hub_id: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(VL2Error, match="could not be fetched") as caught:
        resolve_source("deepseek-ai/deepseek-vl2-tiny")
    assert "folder" in caught.value.hint

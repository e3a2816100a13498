"""Exports that are killed, repeated, disturbed, or run out of disk."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest

from tests.export.checkpoints import copy_checkpoint
from tests.forked import dies, in_a_child
from vl2.errors import VL2Error
from vl2.export import ExportOptions, export_checkpoint
from vl2.export.staging import STATE_NAME, open_staging
from vl2.manifest import MANIFEST_NAME, read_manifest

OPTIONS = ExportOptions(scheme="fp16", verify=False)


class Killed(BaseException):
    """What a test throws where a process would die."""


@pytest.fixture
def checkpoint(goldens: Path) -> Path:
    return goldens / "tiny-mini"


def stop_at(stage: str):
    def progress(current: str, done_bytes: int, total_bytes: int) -> None:
        if current == stage:
            raise Killed

    return progress


def partial(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


@pytest.mark.parametrize("stage, finished", [
    ("vision weights", []), ("decoder graph", ["vision"]), ("decoder weights", ["vision"]),
    ("embeddings weights", ["vision", "decoder"]),
])
def test_an_interrupted_export_goes_on_behind_the_last_finished_part(
    checkpoint: Path, tmp_path: Path, bundle_of, stage: str, finished: list[str]
) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(Killed):
        export_checkpoint(checkpoint, out, OPTIONS, stop_at(stage))
    assert not out.exists()
    kept = {name: (partial(out) / f"{name}.data").stat().st_mtime_ns for name in finished}
    manifest = export_checkpoint(checkpoint, out, OPTIONS)
    assert {name: (out / f"{name}.data").stat().st_mtime_ns for name in finished} == kept
    assert manifest.files == read_manifest(bundle_of(checkpoint, "fp16")).files
    assert not partial(out).exists() and not (out / STATE_NAME).exists()


def test_an_export_that_is_killed_leaves_no_bundle_and_is_resumed(
    checkpoint: Path, tmp_path: Path, bundle_of
) -> None:
    out = tmp_path / "bundle"

    def progress(stage: str, done_bytes: int, total_bytes: int) -> None:
        if stage == "decoder graph":
            dies()

    assert not in_a_child(lambda: export_checkpoint(checkpoint, out, OPTIONS, progress))
    assert not out.exists() and (partial(out) / "vision.data").exists()
    before = (partial(out) / "vision.data").stat().st_mtime_ns
    manifest = export_checkpoint(checkpoint, out, OPTIONS)
    assert (out / "vision.data").stat().st_mtime_ns == before
    assert manifest.files == read_manifest(bundle_of(checkpoint, "fp16")).files


def test_parts_of_another_scheme_are_not_taken_over(checkpoint: Path, tmp_path: Path, bundle_of) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(Killed):
        export_checkpoint(checkpoint, out, ExportOptions("fp32", verify=False), stop_at("decoder weights"))
    manifest = export_checkpoint(checkpoint, out, OPTIONS)
    assert manifest.files == read_manifest(bundle_of(checkpoint, "fp16")).files


def test_an_existing_bundle_is_kept_unless_forced(checkpoint: Path, tmp_path: Path, bundle_of) -> None:
    out = Path(shutil.copytree(bundle_of(checkpoint, "fp32"), tmp_path / "bundle"))
    with pytest.raises(VL2Error, match="--force"):
        export_checkpoint(checkpoint, out, OPTIONS)
    with pytest.raises(Killed):
        export_checkpoint(checkpoint, out, ExportOptions("fp16", verify=False, force=True), stop_at("decoder weights"))
    assert read_manifest(out).scheme == "fp32"
    export_checkpoint(checkpoint, out, ExportOptions("fp16", verify=False, force=True))
    assert read_manifest(out).scheme == "fp16"
    assert {path.name for path in tmp_path.iterdir()} == {"bundle"}


def test_a_folder_that_is_no_bundle_is_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(VL2Error, match="not a bundle"):
        export_checkpoint(checkpoint, tmp_path / "photos", ExportOptions(force=True))
    assert (tmp_path / "photos" / "cat.png").exists()


def test_a_link_and_a_mount_point_are_refused_before_any_work(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "latest").symlink_to("volume")
    with pytest.raises(VL2Error, match="latest is a symbolic link"):
        export_checkpoint(checkpoint, tmp_path / "latest", OPTIONS)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")
    with pytest.raises(VL2Error, match="volume is a mount point"):
        export_checkpoint(checkpoint, tmp_path / "volume", OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {"volume", "latest"}


def test_a_finished_bundle_that_cannot_be_renamed_is_not_lost(tmp_path: Path, monkeypatch) -> None:
    out, rename = tmp_path / "bundle", os.rename

    def busy(source: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with open_staging(out) as staging:
        staging.resume({"scheme": "fp16"})
        (staging.folder / "vision.data").write_bytes(b"weights")
        staging.finish("vision", {"vision.data": {"size_bytes": 7, "sha256": ""}}, {})
        monkeypatch.setattr(os, "rename", busy)
        with pytest.raises(VL2Error, match="could not be renamed to .*bundle: Device or resource busy") as caught:
            staging.publish()
        assert ".bundle.partial" in caught.value.hint
    monkeypatch.setattr(os, "rename", rename)
    with open_staging(out) as staging:
        assert staging.resume({"scheme": "fp16"}) == ["vision"]
        staging.publish()
    assert (out / "vision.data").read_bytes() == b"weights" and not (out / STATE_NAME).exists()


def test_two_exports_to_one_place_do_not_mix(checkpoint: Path, tmp_path: Path) -> None:
    with open_staging(tmp_path / "bundle"), pytest.raises(VL2Error, match="another export"):
        export_checkpoint(checkpoint, tmp_path / "bundle", OPTIONS)


def test_a_missing_parent_folder_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(VL2Error, match="mkdir -p"):
        export_checkpoint(checkpoint, tmp_path / "no" / "bundle", OPTIONS)


def test_too_small_a_disk_is_noticed_before_writing(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(VL2Error, match="free"):
        export_checkpoint(checkpoint, tmp_path / "bundle", OPTIONS)
    assert not list(partial(tmp_path / "bundle").iterdir())


def test_a_disk_that_fills_up_says_so_and_is_cleaned(checkpoint: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # decoder.data is bigger, vision.data is not
    try:
        with pytest.raises(VL2Error, match="disk .* full") as caught:
            export_checkpoint(checkpoint, tmp_path / "bundle", OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "was removed" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_place_that_may_not_be_written_is_named(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    def refuse(self: Path, *_, **__) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere, so the refusal is made here
    with pytest.raises(VL2Error, match="cannot be written"):
        export_checkpoint(checkpoint, tmp_path / "bundle", OPTIONS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(checkpoint: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(VL2Error, match="cannot be written"):
            export_checkpoint(checkpoint, tmp_path / "bundle", OPTIONS)
    finally:
        tmp_path.chmod(0o700)


def test_a_damaged_record_says_what_to_delete(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    partial(out).mkdir()
    (partial(out) / STATE_NAME).write_text("{")
    with pytest.raises(VL2Error, match="damaged") as caught:
        export_checkpoint(checkpoint, out, OPTIONS)
    assert str(partial(out)) in str(caught.value)


def test_the_manifest_is_written_last(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(Killed):
        export_checkpoint(checkpoint, out, OPTIONS, stop_at("embeddings weights"))
    assert not (partial(out) / MANIFEST_NAME).exists()


def test_a_checkpoint_that_changes_under_the_export_is_noticed(goldens: Path, tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(goldens / "tiny-mini", tmp_path / "checkpoint")

    def touch(stage: str, done_bytes: int, total_bytes: int) -> None:
        if stage == "embeddings weights":
            os.utime(checkpoint / "model.safetensors", ns=(1, 1))

    with pytest.raises(VL2Error, match="changed while"):
        export_checkpoint(checkpoint, tmp_path / "bundle", OPTIONS, touch)
    assert not (tmp_path / "bundle").exists()

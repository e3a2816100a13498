"""A bundle under construction: written beside its place, resumable part by part, renamed there whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vl2.errors import VL2Error
from vl2.folder_lock import locked_folder
from vl2.manifest import MANIFEST_NAME

STATE_NAME = "export-state.json"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class Staging:
    """The folder `.NAME.partial` beside the bundle's place, and the record of its finished parts."""

    def __init__(self, out: Path):
        self.out = out
        self.folder = out.parent / f".{out.name}.partial"
        self._finished: dict[str, Any] = {}
        self._inputs: dict[str, Any] = {}

    def resume(self, inputs: dict[str, Any]) -> list[str]:
        """Names of the parts that are finished already; parts made from other inputs are thrown away.

        inputs: all that the parts depend on, as JSON.
        """
        self._inputs = json.loads(json.dumps(inputs))
        state = self._read_state()
        if state.get("inputs") == self._inputs:
            self._finished = {name: part for name, part in state["finished"].items() if self._is_whole(part)}
        kept = {STATE_NAME, *(file for part in self._finished.values() for file in part["files"])}
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink()
        return list(self._finished)

    def part(self, name: str) -> dict[str, Any] | None:
        """What was recorded when a part was finished; None when it is not."""
        return self._finished.get(name)

    def finish(self, name: str, files: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
        """Records a part as finished. files: {"size_bytes", "sha256"} by file name; record: what else is known."""
        self._finished[name] = {"files": files, **record}
        state = {"inputs": self._inputs, "finished": self._finished}
        unfinished = self.folder / f"{STATE_NAME}.part"
        unfinished.write_text(json.dumps(state, indent=1), encoding="utf-8")
        os.replace(unfinished, self.folder / STATE_NAME)
        return self._finished[name]

    def publish(self) -> None:
        """Renames the folder to the bundle's place; an older bundle there is removed only afterwards.

        Raises VL2Error where that fails; the parts are then still resumed.
        """
        older = self.out.parent / f".{self.out.name}.replaced"
        try:
            if older.exists():
                shutil.rmtree(older)
            if self.out.exists():
                os.rename(self.out, older)
            os.rename(self.folder, self.out)
        except OSError as error:
            raise VL2Error(f"the finished bundle could not be renamed to {self.out}: {error.strerror or error}",
                           f"mend that and start again: all parts lie in {self.folder}") from error
        (self.out / STATE_NAME).unlink()
        _sync_folder(self.out.parent)
        if older.exists():
            shutil.rmtree(older)

    def discard(self) -> None:
        """Removes everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read_state(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / STATE_NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise VL2Error(f"{self.folder / STATE_NAME} is damaged ({error})", f"delete {self.folder}") from error

    def _is_whole(self, part: dict[str, Any]) -> bool:
        paths = {self.folder / name: facts["size_bytes"] for name, facts in part["files"].items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def check_place(out: Path, force: bool) -> None:
    """Raises VL2Error unless a bundle may be written at `out`."""
    if not out.parent.is_dir():
        raise VL2Error(f"there is no folder {out.parent} to write {out.name} into", f"mkdir -p {out.parent}")
    if out.is_symlink():
        raise VL2Error(f"{out} is a symbolic link, and a bundle replaces what stands there",
                       "give the folder that it names, or another --out")
    if out.exists() and os.path.ismount(out):
        raise VL2Error(f"{out} is a mount point, to which no finished folder can be renamed",
                       f"give a folder in it, such as {out / 'model.bundle'}")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST_NAME).is_file():
        raise VL2Error(f"{out} exists and is not a bundle", "give another --out; it is not replaced even with --force")
    if not force:
        raise VL2Error(f"{out} exists", "give another --out, or --force to replace it once the new bundle is whole")


def check_space(staging: Staging, bundle_bytes: int) -> None:
    """Raises VL2Error when the disk cannot hold what is still to be written."""
    written = sum(path.stat().st_size for path in staging.folder.iterdir())
    free = shutil.disk_usage(staging.folder).free
    if free < bundle_bytes - written:
        raise VL2Error(
            f"{staging.out.parent} has {free / 1e9:.2f} GB free, and {staging.out.name} needs "
            f"{(bundle_bytes - written) / 1e9:.2f} GB",
            "free space, or give an --out on another disk",
        )


@contextmanager
def open_staging(out: Path) -> Iterator[Staging]:
    """The staging folder of a bundle, locked for this process.

    Left in place when the work inside is interrupted, so that it can be resumed; removed when the disk is full.
    Raises VL2Error when another export writes there, when the disk is full or writing is not allowed.
    """
    staging = Staging(out)
    try:
        staging.folder.mkdir(exist_ok=True)
        with locked_folder(staging.folder, "export"):
            yield staging
    except OSError as error:
        if error.errno in _FULL:
            free = shutil.disk_usage(out.parent).free
            staging.discard()
            raise VL2Error(
                f"the disk of {out.parent} is full: {error.strerror} at {free / 1e9:.2f} GB free; what was written of "
                f"{out.name} was removed",
                "free space, or give an --out on another disk; `--dry-run` says how much is needed",
            ) from error
        if error.errno in _FORBIDDEN:
            raise VL2Error(f"{out.parent} cannot be written: {error.strerror}", "give another --out") from error
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

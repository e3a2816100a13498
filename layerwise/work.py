"""A measurement's folder: a ledger a finished step and the states behind it, so that an interrupted one goes on.

    OUT.partial/
      job.json                 what it was begun with
      {step}.json              the ledger of a finished step
      {step}.safetensors       the states behind it: reference, quantized where it differs, modality, following
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from vl2.calib.tensor_file import read_tensor, shapes_of, write_tensors
from vl2.errors import VL2Error
from vl2.json_file import read_json
from vl2.layerwise.ledger import Ledger
from vl2.layerwise.parts import States
from vl2.safetensors_file import read_header

_JOB_NAME = "job.json"


class WorkFolder:
    """Raises VL2Error where the folder was begun for another job."""

    def __init__(self, folder: Path, job: dict[str, Any]):
        self.folder, path = folder, folder / _JOB_NAME
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists() and not any(folder.iterdir()):
            _write(path, job)
        elif not path.exists() or read_json(path) != job:
            raise VL2Error(f"{folder} was begun with other checkpoints or data",
                           f"repeat the command it was begun with, or remove it to begin anew: rm -r {folder}")

    def has(self, step: str) -> bool:
        return (self.folder / f"{step}.json").exists()

    def ledger(self, step: str) -> Ledger:
        return Ledger.from_json(read_json(self.folder / f"{step}.json"))

    def finish(self, step: str, ledger: Ledger, states: States, following: Tensor) -> None:
        """Keeps a step's states, then its ledger, which makes it finished."""
        tensors = {"reference": states.reference, "modality": states.modality, "following": following}
        if not states.same:
            tensors["quantized"] = states.quantized
        write_tensors(self._states(step), shapes_of(tensors), tensors.items())
        _write(self.folder / f"{step}.json", ledger.to_json())

    def states(self, step: str) -> tuple[States, Tensor]:
        """The states behind a finished step, and what follows each position."""
        entries = read_header(self._states(step))
        reference = read_tensor(entries["reference"])
        quantized = read_tensor(entries["quantized"]) if "quantized" in entries else reference
        return States(reference, quantized, read_tensor(entries["modality"])), read_tensor(entries["following"])

    def forget_states(self, step: str) -> None:
        """Removes states that a later step has made needless."""
        self._states(step).unlink(missing_ok=True)

    def _states(self, step: str) -> Path:
        return self.folder / f"{step}.safetensors"


def _write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.writing")
    partial.write_text(json.dumps(values, allow_nan=False), encoding="utf-8")
    partial.replace(path)

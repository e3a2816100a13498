"""The checkpoint that is quantized, read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import Tensor

from vl2.config import load_config
from vl2.errors import VL2Error
from vl2.model.checkpoint import check_checkpoint, check_unquantized, read_tensor
from vl2.quant.linears import WEIGHT


class Source:
    """A checkpoint folder, checked from its headers. Raises VL2Error as `check_checkpoint` does."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.config = load_config(self.folder)
        check_unquantized(self.folder, self.config)
        self.entries = check_checkpoint(self.folder, self.config)

    def tensor(self, name: str) -> Tensor:
        """In the file's dtype; VL2Error naming it on NaN or infinity."""
        return read_tensor(self.entries[name])

    def weight(self, module: str) -> Tensor:
        """float32 [N, K]."""
        return self.tensor(module + WEIGHT).float()

    def fingerprint(self) -> str:
        """Tells whether the files are still those of an interrupted job: configuration, names, sizes and times."""
        shards = sorted({entry.path for entry in self.entries.values()})
        try:
            status = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
        except OSError as error:
            raise VL2Error(f"cannot read {error.filename}: {error.strerror}") from error
        text = json.dumps([(self.folder / "config.json").read_text(encoding="utf-8"), status])
        return hashlib.sha256(text.encode()).hexdigest()

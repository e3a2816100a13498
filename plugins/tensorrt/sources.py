"""Which sources an engine depends on: it keeps fields and scratch sizes that only they make sense of."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from vl2.plugins.cuda.pack import pack_hash

_PLUGINS = Path(__file__).parents[1]
SOURCES = (*(_PLUGINS / "cuda" / f"{name}.py" for name in
             ("launch", "storage", "routing", "experts", "linear", "attention", "latent")),
           _PLUGINS / "tensorrt" / "operators.py", _PLUGINS / "tensorrt" / "plugin.py")  # fmt: skip


@cache
def plugin_hash() -> str:
    """Of the kernels, of what plans their launches and of what TensorRT is told: a bundle's manifest records it for its
    engines. An engine of other fields would be misread, one of other plans have too little scratch."""
    digest = hashlib.sha256(pack_hash().encode())
    for path in SOURCES:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()

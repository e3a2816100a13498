"""Headers of safetensors files, read and checked without loading a weight.

Layout: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data,
packed without holes. A checkpoint is one `model.safetensors` or shards named by `model.safetensors.index.json`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl2.errors import VL2Error
from vl2.json_file import unique_keys

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the limit of the format's own reader
_AGAIN = "the file is damaged or was not fetched whole: fetch it again"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `offset` is counted from the start of the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    path: Path


def read_header(path: Path | str) -> dict[str, TensorEntry]:
    """The tensors of one file, in the order of their data.

    Raises VL2Error naming file (and tensor) on a truncated, oversized or malformed file, an unknown dtype, a size that
    does not follow from dtype and shape, and on overlaps, holes and bytes left over.
    """
    path = Path(path)
    header, start, end = _read_json(path)
    header.pop("__metadata__", None)
    entries = [_entry(name, value, start, path) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.size_bytes))
    position = start
    for entry in entries:
        where = f"tensor `{entry.name}` in {path}"
        if entry.offset != position:
            what = "overlaps the tensor before it" if entry.offset < position else "leaves a hole before it"
            raise VL2Error(f"{where} {what}: it starts at byte {entry.offset}, expected {position}", _AGAIN)
        position += entry.size_bytes
        if position > end:
            raise VL2Error(f"{where} is truncated: it ends at byte {position}, the file at {end}", _AGAIN)
    if position != end:
        raise VL2Error(f"{path} has {end - position} bytes after its last tensor, expected none", _AGAIN)
    return {entry.name: entry for entry in entries}


def checkpoint_entries(folder: Path | str) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint folder, by name.

    Follows the index where there is one. Raises VL2Error on a missing shard, a tensor that its shard lacks or the index
    does not list, and on a folder with pickled weights only.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).exists():
        return _indexed_entries(folder)
    if (folder / SINGLE_NAME).exists():
        return read_header(folder / SINGLE_NAME)
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickled:
        raise VL2Error(
            f"{folder} has its weights as Python pickle ({pickled[0]}), which can run code when it is opened",
            "convert them where you trust their source: load with torch.load(..., weights_only=True) and save with "
            "safetensors.torch.save_file, or fetch the repository's safetensors files",
        )
    raise VL2Error(
        f"{folder} has neither {INDEX_NAME} nor {SINGLE_NAME}", "give a checkpoint folder in the Hugging Face layout"
    )


def _indexed_entries(folder: Path) -> dict[str, TensorEntry]:
    index = folder / INDEX_NAME
    weight_map = _weight_map(index)
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, []).append(name)
    entries = {}
    for shard, names in sorted(shards.items()):
        if not (folder / shard).exists():
            raise VL2Error(f"{index} names the shard {shard}, which is missing", f"fetch {shard} into the same folder")
        header = read_header(folder / shard)
        for name in names:
            if name not in header:
                raise VL2Error(f"{index} places tensor `{name}` in {shard}, which does not hold it")
        unlisted = sorted(header.keys() - set(names))
        if unlisted:
            raise VL2Error(f"{folder / shard} holds tensor `{unlisted[0]}`, which {index.name} does not place there")
        entries.update(header)
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)["weight_map"]
    except OSError as error:
        raise VL2Error(f"cannot read {index}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VL2Error(f"{index} is not a valid index: {error}", "expected JSON with a `weight_map` object") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise VL2Error(f"{index} has an empty or malformed `weight_map`")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise VL2Error(
                f"{index} places tensor `{name}` in {shard!r}, expected a .safetensors file of the same folder",
                "pickled weights (.bin, .pt) are not opened: fetch the repository's safetensors files",
            )
    return weight_map


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if end < 8 or length > end - 8:
                raise VL2Error(f"{path} is truncated: its header needs {8 + length} bytes, the file has {end}", _AGAIN)
            if length > _MAX_HEADER:
                raise VL2Error(f"{path} has a header of {length} bytes, expected at most {_MAX_HEADER}", _AGAIN)
            text = file.read(length)
    except OSError as error:
        raise VL2Error(f"cannot read {path}: {error.strerror}") from error
    try:
        header = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise VL2Error(f"{path} has a broken header: {error}", "expected a safetensors file") from error
    if not isinstance(header, dict):
        raise VL2Error(f"{path} has a header of type {type(header).__name__}, expected a JSON object")
    return header, 8 + length, end


def _entry(name: str, value: Any, start: int, path: Path) -> TensorEntry:
    where = f"tensor `{name}` in {path}"
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise VL2Error(f"{where} has a malformed header entry {value!r}") from error
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise VL2Error(f"{where} has the unknown dtype {dtype!r}, expected one of {', '.join(DTYPE_BYTES)}")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise VL2Error(f"{where} has a malformed shape or offset: {value!r}")
    size = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != size:
        raise VL2Error(f"{where} takes {end - begin} bytes, but {dtype} {list(shape)} needs {size}", _AGAIN)
    return TensorEntry(name, dtype, shape, start + begin, size, path)

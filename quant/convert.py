"""GPTQ-format checkpoints into compressed-tensors ones: part by part, codes kept, renamed into place whole.

In `OUT.partial/` lies a shard a finished part and `job.json`, which says what it was begun from; the same command goes
on there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from vl2.errors import VL2Error
from vl2.json_file import read_json
from vl2.model.tensors import read_tensor
from vl2.quant.checkpoint import packed_tensors
from vl2.quant.gptq_source import SCALES, GptqCheckpoint
from vl2.quant.linears import WEIGHT, matrices
from vl2.quant.parts import split_parts
from vl2.quant.plan import stored_bytes
from vl2.quant.publish import check_place, publish, put_in_place
from vl2.quant.recipe import Recipe
from vl2.quant.shard import write_shard, write_text
from vl2.safetensors_file import DTYPE_BYTES, read_header

_JOB_NAME = "job.json"
Progress = Callable[[str, int, int], None]


def plan_conversion(source: Path) -> dict[str, Any]:
    """What `convert_checkpoint` would return, and "size_bytes" of the tensors; reads the codes and writes nothing."""
    checkpoint = GptqCheckpoint(source)
    size = 0
    for name in checkpoint.tensor_names():
        module = name.removesuffix(WEIGHT)
        form = checkpoint.forms.get(module) if name.endswith(WEIGHT) else None
        if form is None:
            size += checkpoint.entries[name].size_bytes
        else:
            scale_bytes = DTYPE_BYTES[checkpoint.entries[module + SCALES].dtype]
            size += stored_bytes(form, *matrices(checkpoint.config)[module], scale_bytes)
    return {**_summary(checkpoint, _description(checkpoint)["converted"]), "size_bytes": size}


def convert_checkpoint(
    source: Path, out: Path, progress: Progress | None = None, force: bool = False
) -> dict[str, Any]:
    """Writes the GPTQ-format folder `source` as a compressed-tensors one to `out`; returns what was converted.

    Every dequantized weight is bit for bit the source's; tensors that are not quantized are copied. The result:
    "matrices" (count), "forms" (count by form), "split_groups" and "widened" (modules, see `gptq_source`),
    "zero_biases" (names left out), "format", "made_by". progress(part, done, total) is called after each part. Raises
    VL2Error on an existing `out` (unless forced), a partial one of another source, and as `GptqCheckpoint` does.
    """
    out = Path(out)
    check_place(out, force)
    checkpoint = GptqCheckpoint(source)
    work = out.with_name(out.name + ".partial")
    _begin(work, checkpoint)
    parts = split_parts(checkpoint.tensor_names())
    shards = [work / f"model-{index:05}-of-{len(parts):05}.safetensors" for index in range(1, len(parts) + 1)]
    for done, ((part, names), shard) in enumerate(zip(parts.items(), shards, strict=True), start=1):
        if not shard.exists():
            write_shard(shard, _tensors(checkpoint, names))
        if progress is not None:
            progress(str(part), done, len(parts))
    description = _description(checkpoint)
    publish(checkpoint, work, {shard.name: read_header(shard) for shard in shards}, description)
    put_in_place(work, out, [_JOB_NAME])
    return _summary(checkpoint, description["converted"])


def _tensors(checkpoint: GptqCheckpoint, names: list[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in names:
        module = name.removesuffix(WEIGHT)
        if name.endswith(WEIGHT) and checkpoint.forms.get(module) is not None:
            tensors |= packed_tensors(module, checkpoint.quantized(module))
        else:
            tensors[name] = read_tensor(checkpoint.entries[name])
    return tensors


def _description(checkpoint: GptqCheckpoint) -> dict[str, Any]:
    """What `quantization.json` says; the errors of the matrices are not known, as the original is not at hand."""
    gptq = checkpoint.gptq
    matrices = [
        {"module": module, "scheme": form.describe(), "group_size": form.group_size, "method": "gptq"}
        for module, form in checkpoint.forms.items() if form is not None
    ]  # fmt: skip
    converted = {"format": "gptq" if gptq.zero_offset else "gptq_v2", "made_by": gptq.made_by, **checkpoint.changed(),
                 "zero_biases": checkpoint.zero_biases}  # fmt: skip
    return {
        "recipe": Recipe(gptq.name, ()), "method": "gptq",
        "calibration": {"format": "unknown", "made_by": gptq.made_by}, "leaning_experts": {},
        "converted": converted, "forms": checkpoint.forms, "matrices": matrices,
    }  # fmt: skip


def _summary(checkpoint: GptqCheckpoint, converted: dict[str, Any]) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for form in checkpoint.forms.values():
        if form is not None:
            counts[form.describe()] = counts.get(form.describe(), 0) + 1
    return {"scheme": checkpoint.gptq.name, "matrices": sum(counts.values()), "forms": counts, **converted}


def _begin(work: Path, checkpoint: GptqCheckpoint) -> None:
    shards = sorted({entry.path for entry in checkpoint.entries.values()})
    status = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
    text = json.dumps([(checkpoint.folder / "config.json").read_text(encoding="utf-8"), status])
    job = {"converted_from": hashlib.sha256(text.encode()).hexdigest()}
    path = work / _JOB_NAME
    if not work.exists():
        work.mkdir(parents=True)
        write_text(path, json.dumps(job))
    elif not path.exists() or read_json(path) != job:
        raise VL2Error(f"{work} was begun from another checkpoint or by another command", "remove it to begin anew")

"""What makes shards a checkpoint that others open: index, configuration, tokenizer, description, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vl2.checkpoint_name import checkpoint_name
from vl2.errors import VL2Error
from vl2.file_hashes import HashCache
from vl2.json_file import read_json, to_json
from vl2.modules import module_of
from vl2.quant import vllm
from vl2.quant.card import model_card
from vl2.quant.gptq_source import GptqCheckpoint
from vl2.quant.quantization_config import write_config
from vl2.quant.shard import write_text
from vl2.quant.source import Source
from vl2.safetensors_file import INDEX_NAME, TensorEntry

DESCRIPTION_NAME, RECIPE_NAME = "quantization.json", "recipe.json"
SCHEMA_VERSION = 1
# Copied as they are; of these a checkpoint must have those that make a prompt.
_COPIED = ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_ALSO_COPIED = ("generation_config.json", "preprocessor_config.json", "added_tokens.json", "LICENSE")


def publish(
    source: Source | GptqCheckpoint,
    folder: Path,
    shards: Mapping[str, Mapping[str, TensorEntry]],
    description: Mapping[str, Any],
) -> None:
    """Writes everything but the shards into `folder`: `shards` are its shard files' headers.

    description: the job's recipe, method, calibration, forms and reports, as `Quantizer.description` gives them. The
    source's own `quantization_config`, which a converted one has, is replaced.
    """
    _write_index(folder, shards)
    config = read_json(source.folder / "config.json")
    config["quantization_config"] = write_config(description["forms"], description["recipe"].target == vllm.NAME)
    write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    for name in (*_COPIED, *_ALSO_COPIED):
        if (source.folder / name).exists():
            shutil.copyfile(source.folder / name, folder / name)
    if description["recipe"].rules:
        write_text(folder / RECIPE_NAME, json.dumps(to_json(description["recipe"]), indent=1) + "\n")
    facts = {"schema_version": SCHEMA_VERSION, "source": _source_facts(source), "modules": _sizes(shards)}
    facts |= {key: value for key, value in to_json(dict(description)).items() if key != "forms"}
    write_text(folder / DESCRIPTION_NAME, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "README.md", model_card(facts))


def check_place(out: Path, force: bool) -> None:
    """Raises VL2Error unless a quantized checkpoint may be written at `out`."""
    if out.exists() and not force:
        raise VL2Error(f"{out} exists", "give another name, or --force to replace it once the new one is whole")
    if out.is_file() or (out.exists() and any(out.iterdir()) and not (out / DESCRIPTION_NAME).is_file()):
        raise VL2Error(f"{out} exists and is no quantized checkpoint",
                       "give another name; it is not replaced even with --force")


def put_in_place(work: Path, out: Path, left_over: Iterable[str]) -> None:
    """Renames the finished `work` to `out`; an older folder there goes last.

    left_over: names in `work` that only an unfinished job needs, removed after the renaming: killed in between, the
    job could not be resumed without them.
    """
    replaced = out.with_name(out.name + ".replaced")
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.replace(replaced)
    work.replace(out)
    for name in left_over:
        (out / name).unlink()
    if replaced.exists():
        shutil.rmtree(replaced)


def _write_index(folder: Path, shards: Mapping[str, Mapping[str, TensorEntry]]) -> None:
    weight_map = {name: shard for shard, header in shards.items() for name in header}
    total = sum(entry.size_bytes for header in shards.values() for entry in header.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _source_facts(source: Source | GptqCheckpoint) -> dict[str, Any]:
    """Name and files of the checkpoint with their sha256; hashes of big files are remembered by the user's cache."""
    hashes = HashCache()
    paths = sorted({entry.path for entry in source.entries.values()} | {source.folder / "config.json"})
    files = {path.name: hashes.sha256_of(path) for path in paths}
    hashes.save()
    return {"name": checkpoint_name(source.folder), "files": files}


def _sizes(shards: Mapping[str, Mapping[str, TensorEntry]]) -> dict[str, int]:
    """Bytes by module, as `vl2.modules` names them."""
    sizes: dict[str, int] = {}
    for header in shards.values():
        for name, entry in header.items():
            module = module_of(name)
            sizes[module] = sizes.get(module, 0) + entry.size_bytes
    return dict(sorted(sizes.items()))

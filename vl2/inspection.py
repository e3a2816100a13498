"""What a checkpoint or a bundle is, read from its JSON files and tensor headers; no weight is loaded."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from vl2.config import ModelConfig, load_config
from vl2.errors import VL2Error
from vl2.file_hashes import sha256_of
from vl2.json_file import read_json
from vl2.manifest import Manifest, read_manifest
from vl2.modules import module_of
from vl2.quantization import DESCRIPTION_NAME, PACKED, SCALE, SHAPE, Form
from vl2.safetensors_file import TensorEntry, checkpoint_entries


def inspect_path(path: Path, hashes: bool = False) -> dict[str, Any]:
    """Facts of a checkpoint or bundle folder; `hashes` adds the sha256 of a checkpoint's files.

    Raises VL2Error when the folder is neither.
    """
    if (path / "manifest.json").is_file():
        return _bundle_facts(path, read_manifest(path))
    if (path / "config.json").is_file():
        return _checkpoint_facts(path, load_config(path), hashes)
    found = "does not exist" if not path.exists() else "has neither manifest.json nor config.json"
    raise VL2Error(f"`{path}` {found}", hint="give the folder of a bundle or of a Hugging Face checkpoint")


def _checkpoint_facts(path: Path, config: ModelConfig, hashes: bool) -> dict[str, Any]:
    entries = checkpoint_entries(path)
    modules: dict[str, dict] = defaultdict(lambda: {"parameters": 0, "size_bytes": 0, "dtypes": Counter()})
    for entry in entries.values():
        module = modules[module_of(entry.name)]
        module["size_bytes"] += entry.size_bytes
        if entry.name.endswith(PACKED):
            form = _form(config, entry)
            module["parameters"] += entry.shape[0] * (entry.shape[1] * 32 // form.bits)
            module["dtypes"][form.describe()] += 1
        elif not entry.name.endswith((SCALE, SHAPE)):
            module["parameters"] += _count(entry.shape)
            module["dtypes"][entry.dtype] += 1
    language = config.language_config
    files = sorted({entry.path for entry in entries.values()})
    facts = {
        "kind": "checkpoint", "path": str(path), "variant": config.variant,
        "attention": "mla" if language.use_mla else "mha",
        "layers": language.num_hidden_layers, "hidden_size": language.hidden_size,
        "experts": language.n_routed_experts, "experts_per_token": language.num_experts_per_tok,
        "quantization": _quantization(path, config),
        "tensors": len(entries),
        "parameters": sum(module["parameters"] for module in modules.values()),
        "size_bytes": sum(module["size_bytes"] for module in modules.values()),
        "modules": {name: {**module, "dtypes": dict(module["dtypes"])} for name, module in sorted(modules.items())},
        "files": {file.name: {"size_bytes": file.stat().st_size} for file in files},
        "config_sha256": sha256_of(path / "config.json"),
    }
    if hashes:
        for file in files:
            facts["files"][file.name]["sha256"] = sha256_of(file)
    return facts


def _form(config: ModelConfig, packed: TensorEntry) -> Form:
    module = packed.name.removesuffix(PACKED)
    form = config.quantization_config.form_of(module) if config.quantization_config else None
    if form is None:
        raise VL2Error(f"`{packed.name}` in {packed.path} is packed, and config.json gives `{module}` no "
                       "quantization", hint="config.json and the weights must come from the same quantization")
    return form


def _quantization(path: Path, config: ModelConfig) -> dict[str, Any] | None:
    """What quantization.json says of recipe and method, where there is one; None for unquantized checkpoints."""
    if config.quantization_config is None:
        return None
    facts = read_json(path / DESCRIPTION_NAME) if (path / DESCRIPTION_NAME).is_file() else {}
    recipe = facts.get("recipe")
    return {"recipe": recipe.get("name") if isinstance(recipe, dict) else None, "method": facts.get("method")}


def _bundle_facts(path: Path, manifest: Manifest) -> dict[str, Any]:
    facts = manifest.to_dict()
    total = sum(file["size_bytes"] for file in facts["files"].values())
    return {"kind": "bundle", "path": str(path), "size_bytes": total, **facts}


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def describe(facts: dict[str, Any]) -> str:
    """The facts as text for a person."""
    head = [f"{facts['kind']} {facts['path']}", f"variant {facts['variant']}, {_size(facts['size_bytes'])}"]
    body = _checkpoint_lines(facts) if facts["kind"] == "checkpoint" else _bundle_lines(facts)
    return "\n".join(head + body)


def _checkpoint_lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"{facts['layers']} layers, hidden {facts['hidden_size']}, {facts['attention'].upper()} attention, "
             f"{facts['experts']} experts, {facts['experts_per_token']} a token",
             f"{facts['tensors']:,} tensors, {facts['parameters']:,} parameters", *_quantization_lines(facts), "",
             "modules"]
    for name, module in facts["modules"].items():
        dtypes = ", ".join(f"{dtype}×{count}" for dtype, count in sorted(module["dtypes"].items()))
        lines.append(f"  {name:20} {module['parameters']:>16,} {_size(module['size_bytes']):>10}  {dtypes}")
    return [*lines, "", "files", *_file_lines(facts["files"]), f"config.json sha256 {facts['config_sha256']}"]


def _quantization_lines(facts: dict[str, Any]) -> list[str]:
    quantization = facts.get("quantization")
    if quantization is None:
        return []
    recipe = quantization.get("recipe")
    name = recipe.get("name") if isinstance(recipe, dict) else recipe
    return [f"quantized: recipe {name or 'not said'}, method {quantization.get('method') or 'not said'}"]


def _bundle_lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"scheme {facts['scheme']}, lowering {facts['lowering']}, mode {facts['mode']}, "
             f"parity {facts['verify']['status']}, from {facts['source']['name']}",
             *_quantization_lines(facts)]
    lines += ["", "modules"]
    forms = (facts.get("quantization") or {}).get("forms", {})
    for name, module in facts["modules"].items():
        stored = ", ".join(f"{form}×{count}" for form, count in sorted(forms.get(name, {}).items()))
        lines.append(f"  {name:20} {module['parameters']:>16,} {_size(module['size_bytes']):>10}  {stored}".rstrip())
    for name, graph in facts["graphs"].items():
        lines += ["", f"graph {name}: {graph['file']} + {graph['data_file']}"]
        for way in ("inputs", "outputs"):
            lines += [f"  {way[:-1]:6} {port['name']:22} {port['dtype']:8} {_shape(port['shape'])}"
                      for port in graph[way]]
    lines += [f"engines for {target}: {record['backend']} {record['version']}, compute capability "
              f"{record['compute_capability']}, context {record['sizes']['context']}"
              for target, record in facts["engines"].items()]
    return [*lines, "", "files", *_file_lines(facts["files"])]


def _file_lines(files: dict[str, Any]) -> list[str]:
    return [f"  {name:36} {_size(file['size_bytes']):>10}  {file.get('sha256', '')}".rstrip()
            for name, file in sorted(files.items())]


def _shape(shape: list) -> str:
    return "[" + ", ".join(str(side) for side in shape) + "]"


def _size(size_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes} B"

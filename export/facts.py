"""What the manifest tells of a checkpoint, beside its graphs."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path

from vl2.config import ModelConfig
from vl2.export.checkpoint import Checkpoint
from vl2.export.passes.store_weights import PlacedWeight
from vl2.export.trace import OPSET
from vl2.manifest import ImageFacts, LanguageFacts, ModuleFacts, TokenIds
from vl2.modules import module_of
from vl2.prompt import Processor

# Copied into the bundle where the checkpoint has them; the runtime needs the first three. recipe.json: what a quantized
# checkpoint was made by, for the next one.
_COPIED = (
    "config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "recipe.json",
)
_TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime")


def copied_files(folder: Path) -> list[Path]:
    """The small files of the checkpoint that a bundle holds as well."""
    return [folder / name for name in _COPIED if (folder / name).is_file()]


def copied_contents(folder: Path) -> dict[str, bytes]:
    """What a bundle holds of these files: their bytes, but for config.json of a quantized checkpoint.

    Its `quantization_config` names tensors of the checkpoint's files, which a bundle does not have.
    """
    contents = {path.name: path.read_bytes() for path in copied_files(folder)}
    config = json.loads(contents["config.json"])
    if config.pop("quantization_config", None) is not None:
        contents["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return contents


def image_facts(checkpoint: Checkpoint) -> ImageFacts:
    """Geometry from processor_config.json; the view order from config.json."""
    geometry = Processor.from_folder(checkpoint.folder).geometry
    return ImageFacts(
        tile_size=geometry.tile_size,
        patch_size=geometry.patch_size,
        downsample_ratio=geometry.downsample_ratio,
        tokens_per_side=geometry.tokens_per_side,
        candidate_resolutions=geometry.candidate_resolutions,
        image_mean=geometry.image_mean,
        image_std=geometry.image_std,
        global_view_pos=checkpoint.config.global_view_pos,
    )


def language_facts(config: ModelConfig) -> LanguageFacts:
    """The decoder's sizes."""
    language = config.language_config
    return LanguageFacts(
        hidden_size=language.hidden_size,
        vocab_size=language.vocab_size,
        num_hidden_layers=language.num_hidden_layers,
        attention="mla" if language.use_mla else "mha",
        max_position_embeddings=language.max_position_embeddings,
    )


def token_ids(checkpoint: Checkpoint) -> TokenIds:
    """Ids as the tokenizer files give them."""
    processor = Processor.from_folder(checkpoint.folder)
    return TokenIds(processor.bos_id, processor.eos_id, processor.pad_id, processor.image_id)


def module_facts(placed: Iterable[PlacedWeight], checkpoint: Checkpoint) -> dict[str, ModuleFacts]:
    """Parameters and stored bytes by module."""
    sums: dict[str, ModuleFacts] = {}
    for place in placed:
        module = module_of(checkpoint.entry(place.weight).name)
        old = sums.get(module, ModuleFacts(0, 0))
        sums[module] = ModuleFacts(old.parameters + place.parameters, old.size_bytes + place.size_bytes)
    return sums


def tool_versions(opset: int = OPSET) -> dict[str, str | int]:
    """Versions of what made the bundle."""
    versions = {name.replace("-", "_"): importlib.metadata.version(name) for name in _TOOLS}
    return {"python": platform.python_version(), **versions, "opset": opset}

"""What can be planned for: a published variant by name, the folder of a checkpoint, or a bundle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vl2.config import ModelConfig, load_config
from vl2.errors import VL2Error
from vl2.image import ImageGeometry
from vl2.manifest import MANIFEST_NAME, Manifest, read_manifest
from vl2.planning.schemes import CPU, Storage, form_of_checkpoint, storage_of
from vl2.planning.tensors import Tensor, model_tensors

# config.json of the three published variants, as in tests/goldens/published.
_PUBLISHED = Path(__file__).with_name("published.json")
NAMES = {"tiny": "deepseek-ai/deepseek-vl2-tiny", "small": "deepseek-ai/deepseek-vl2-small",
         "base": "deepseek-ai/deepseek-vl2"}
_PREFIXES = ("deepseek-ai/deepseek-vl2-", "deepseek-vl2-")
_BASE = ("deepseek-ai/deepseek-vl2", "deepseek-vl2")


@dataclass(frozen=True)
class PlannedModel:
    """A model and, of a bundle or a quantized checkpoint, how it is stored already; `scheme` names that."""

    name: str
    config: ModelConfig
    tensors: list[Tensor]
    storage: Storage | None = None
    scheme: str | None = None

    @property
    def is_bundle(self) -> bool:
        """Not a checkpoint: its lowering and cache are as they are."""
        return self.storage is not None and self.config.quantization_config is None

    @property
    def geometry(self) -> ImageGeometry:
        """How images are cut."""
        config = self.config
        return ImageGeometry(config.tile_size, config.vision_config.patch_size,
                             config.projector_config.downsample_ratio, config.candidate_resolutions)


def planned_model(name: str) -> PlannedModel:
    """The model of `tiny`, `small`, `base`, their hub ids, or a folder; no weight file is read.

    Raises VL2Error for what is none of these.
    """
    folder = Path(name)
    if (folder / MANIFEST_NAME).is_file():
        return _of_bundle(name, load_config(folder), read_manifest(folder))
    if (folder / "config.json").is_file():
        return _of_checkpoint(name, load_config(folder))
    variant = _variant(name)
    if variant is None:
        raise VL2Error(f"`{name}` is neither a folder with config.json or {MANIFEST_NAME} nor a published model",
                       f"give a folder, or one of {', '.join((*NAMES, *NAMES.values()))}")
    return _of_checkpoint(NAMES[variant], ModelConfig.from_dict(json.loads(_PUBLISHED.read_text("utf-8"))[variant]))


def _variant(name: str) -> str | None:
    if name in _BASE:
        return "base"
    short = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
    return short if short in NAMES else None


def _of_checkpoint(name: str, config: ModelConfig) -> PlannedModel:
    tensors = model_tensors(config)
    if config.quantization_config is None:
        return PlannedModel(name, config, tensors)
    storage = storage_of(tensors, form_of_checkpoint(config), 2)
    return PlannedModel(name, config, tensors, storage, "as quantized")


def _of_bundle(name: str, config: ModelConfig, manifest: Manifest) -> PlannedModel:
    """Bytes by module are the manifest's; what a step reads of them follows from the tensors' shares."""
    tensors = model_tensors(config)
    counted: dict[str, list[float]] = {}
    for tensor in tensors:
        sums = counted.setdefault(tensor.module, [0.0, 0.0])
        sums[0] += tensor.parameters * tensor.share
        sums[1] += tensor.parameters
    modules = {module: facts.size_bytes for module, facts in manifest.modules.items()}
    read = {module: size * counted[module][0] / counted[module][1] for module, size in modules.items()
            if module in counted and counted[module][0]}
    storage = Storage(modules, read, 4 if manifest.scheme == "fp32" else 2, manifest.quantization is not None,
                      manifest.lowering, _widened(config, manifest), _kv_cache(manifest))
    return PlannedModel(name, config, tensors, storage, manifest.scheme)


def _kv_cache(manifest: Manifest) -> str:
    """By the element type of the decoder's first cache."""
    decoder = manifest.graphs["decoder"]
    dtypes = {port.name: port.dtype for port in decoder.inputs}
    return {"float32": "fp32", "float16": "fp16", "int8": "int8"}[dtypes[decoder.cache[0].past]]


def _widened(config: ModelConfig, manifest: Manifest) -> int:
    """lm_head as float32, where it is stored as float16."""
    elements = config.language_config.vocab_size * config.language_config.hidden_size
    facts = manifest.modules.get("lm_head")
    narrow = facts is not None and facts.size_bytes == 2 * elements and manifest.lowering != CPU
    return 4 * elements if narrow else 0

"""From a checkpoint and the user's options to how a bundle stores its weights, and what its manifest says of that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vl2.errors import VL2Error
from vl2.export.checkpoint import Checkpoint, storing_of
from vl2.export.schemes import check_scheme
from vl2.export.storing import Storing, check_kv_cache, check_lowering, check_mode
from vl2.json_file import read_json
from vl2.manifest import Source
from vl2.modules import module_of
from vl2.quantization import DESCRIPTION_NAME, WEIGHT

# Of quantization.json; what each matrix lost and the source's hashes stay there.
_COPIED = ("recipe", "method", "calibration", "leaning_experts", "coverage", "budget")
# How matrices that the recipe kept are stored, and those of unquantized checkpoints unless told.
UNPACKED_SCHEME = "fp16"


@dataclass(frozen=True)
class ExportOptions:
    """scheme: how weights are stored, "fp32" or "fp16" (None); of a quantized checkpoint None, its codes are kept.
    verify: compare the graphs with PyTorch; force: replace the bundle that is there. lowering: "portable" (standard
    ONNX), "cpu" (our operators) or, for quantized checkpoints only, "ort" (onnxruntime's MatMulNBits); None: as
    `check_lowering` chooses.
    kv_cache: how caches are held, "fp32" (None), with the lowering "cpu" also "fp16" and "int8".
    mode: of our operators, "exact" (None) or "fast", which rounds activations to INT8.
    source: what the manifest names where the folder is only a step on the way from the user's checkpoint."""

    scheme: str | None = None
    verify: bool = True
    force: bool = False
    lowering: str | None = None
    kv_cache: str | None = None
    mode: str | None = None
    source: Source | None = None


def choose_storing(checkpoint: Checkpoint, options: ExportOptions) -> Storing:
    """As the user's options say. Raises VL2Error on unknown ones and on a scheme for packed codes."""
    if checkpoint.quantized and options.scheme is not None:
        raise VL2Error(
            f"{checkpoint.folder} is quantized, and its codes are exported as they are; the scheme `{options.scheme}` "
            "was asked for",
            "leave the scheme out; what the recipe kept is stored as fp16",
        )
    scheme = options.scheme or UNPACKED_SCHEME
    check_scheme(scheme)
    lowering = check_lowering(options.lowering, checkpoint.quantized, options.kv_cache)
    storing = storing_of(checkpoint, scheme, lowering)
    mode = check_mode(options.mode, lowering)
    return replace(storing, kv_cache=check_kv_cache(options.kv_cache, lowering), mode=mode)


def bundle_scheme(checkpoint: Checkpoint, storing: Storing) -> str:
    """The manifest's scheme: the recipe's name, of a checkpoint by others `int4` or `int8` by its smallest codes."""
    if not checkpoint.quantized:
        return storing.scheme
    recipe = _description(checkpoint).get("recipe")
    if isinstance(recipe, dict) and isinstance(recipe.get("name"), str):
        return recipe["name"]
    return f"int{min(form.bits for form in checkpoint.forms.values())}"


def quantization_facts(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The manifest's `quantization`: what quantization.json says, and the forms of the matrices by module."""
    if not checkpoint.quantized:
        return None
    description = _description(checkpoint)
    forms: dict[str, dict[str, int]] = {}
    for module, form in checkpoint.forms.items():
        counts = forms.setdefault(module_of(module + WEIGHT), {})
        counts[form.describe()] = counts.get(form.describe(), 0) + 1
    return {key: description[key] for key in _COPIED if key in description} | {"forms": forms}


def _description(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.folder / DESCRIPTION_NAME
    return read_json(path) if path.is_file() else {}

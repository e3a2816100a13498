"""processor_config.json, read strictly and compared with config.json, which tells some of it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vl2.config import load_config
from vl2.errors import VL2Error
from vl2.image import ImageGeometry
from vl2.json_file import read_json

IMAGE_PLACEHOLDER = "<image>"

# Key → the only value that is supported; it is the published one.
_SUPPORTED = {
    "sft_format": "deepseek", "normalize": True, "add_special_token": False,
    "processor_class": "DeepseekVLV2Processor", "image_token": IMAGE_PLACEHOLDER,
}
_READ = ("candidate_resolutions", "downsample_ratio", "ignore_id", "image_mean", "image_std", "mask_prompt",
         "pad_token", "patch_size")
_FOREIGN = "is this a DeepSeek-VL2 checkpoint?"


@dataclass(frozen=True)
class ProcessorConfig:
    """What processor_config.json says; missing keys have the original's defaults (spec 1.2)."""

    geometry: ImageGeometry
    pad_token: str
    ignore_id: int
    mask_prompt: bool


def read_processor_config(folder: Path) -> ProcessorConfig:
    """Raises VL2Error naming a key that is unknown, unsupported, missing, or another in config.json."""
    path = folder / "processor_config.json"
    values = read_json(path)
    for key, value in values.items():
        if key in _SUPPORTED and value != _SUPPORTED[key]:
            raise VL2Error(f"{path}: {key} is {value!r}, supported is {_SUPPORTED[key]!r}", _FOREIGN)
        if key not in _SUPPORTED and key not in _READ:
            raise VL2Error(f"{path}: unknown key {key!r}", _FOREIGN)
    try:
        geometry = _geometry(values)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise VL2Error(f"{path}: image settings are missing or malformed ({error!r})",
                       "expected candidate_resolutions, patch_size and downsample_ratio as published") from error
    _check_model_config(folder, geometry)
    return ProcessorConfig(geometry, values.get("pad_token", "<｜▁pad▁｜>"), values.get("ignore_id", -100),
                           values.get("mask_prompt", True))


def check_vocabulary(folder: Path, largest_id: int) -> None:
    """Raises VL2Error when the tokenizer gives ids that the model of config.json has no embedding for."""
    if not (folder / "config.json").is_file():
        return
    vocab_size = load_config(folder).language_config.vocab_size
    if largest_id >= vocab_size:
        raise VL2Error(f"{folder}: the tokenizer has id {largest_id}, the model {vocab_size} ids",
                       "the tokenizer belongs to another model; copy the right one")


def _geometry(values: dict) -> ImageGeometry:
    resolutions = tuple((int(width), int(height)) for width, height in values["candidate_resolutions"])
    return ImageGeometry(
        tile_size=resolutions[0][0],
        patch_size=int(values["patch_size"]),
        downsample_ratio=int(values["downsample_ratio"]),
        candidate_resolutions=resolutions,
        image_mean=_per_channel(values.get("image_mean", (0.5, 0.5, 0.5))),
        image_std=_per_channel(values.get("image_std", (0.5, 0.5, 0.5))),
    )


def _per_channel(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _check_model_config(folder: Path, geometry: ImageGeometry) -> None:
    if not (folder / "config.json").is_file():
        return
    model = load_config(folder)
    pairs = {
        "candidate_resolutions": (geometry.candidate_resolutions, model.candidate_resolutions),
        "patch_size": (geometry.patch_size, model.vision_config.patch_size),
        "downsample_ratio": (geometry.downsample_ratio, model.projector_config.downsample_ratio),
    }
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise VL2Error(f"{folder}: {name} is {found} in processor_config.json, {expected} in config.json",
                           "both files must come from the same checkpoint")

"""The `quantization_config` of GPTQ-format checkpoints, as GPTQModel, AutoGPTQ and AutoRound write it.

Every key that could change what a matrix means is checked; those that tell how the codes were found are listed; any
other is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl2.errors import VL2Error
from vl2.json_file import read_json

CONFIG_NAME, OLD_CONFIG_NAME = "config.json", "quantize_config.json"
_KEY = "quantization_config"
_FORMATS = ("gptq", "gptq_v2")
# Keys to the values that are read.
_VALUES: dict[str, tuple[Any, ...]] = {
    "quant_method": ("gptq",), "method": ("gptq", None), "bits": (4, 8), "sym": (True,), "pack_dtype": ("int32", None),
    "checkpoint_format": (*_FORMATS, None), "format": (*_FORMATS, None), "desc_act": (False, True),
    "is_marlin_format": (False, None), "data_type": ("int", None), "act_bits": (16, 32, None), "adapter": (None,),
    "rotation": (None,), "hyb_act": (False, None),
}  # fmt: skip
_PARSED = ("group_size", "dynamic", "extra_config")
# How the codes were found, or what another program does when it loads them.
_TELLING = frozenset(
    "meta lm_head damp_percent damp_auto_increment static_groups true_sequential mse gptaq foem act_group_aware "
    "failsafe fallback v2 model_name_or_path model_file_base_name dataset tokenizer block_name_to_quantize "
    "to_quant_block_names quant_block_list module_name_preceding_first_block modules_in_block_to_quantize batch_size "
    "pad_token_id use_cuda_fp16 model_seqlen max_input_length use_exllama disable_exllama exllama_config backend "
    "cache_block_outputs amp autoround_version auto_round_version enable_minmax_tuning enable_norm_bias_tuning "
    "enable_quanted_input gradient_accumulate_steps iters low_gpu_mem_usage low_cpu_mem_usage lr minmax_lr nsamples "
    "scale_dtype seqlen sampler seed offload_to_disk offload_to_disk_path pack_impl hessian vram_strategy".split()
)
# `dynamic` of GPTQModel: patterns with this prefix name modules that were not quantized.
_SKIPPED = "-:"


@dataclass(frozen=True)
class GptqConfig:
    """shapes: the (bits, group size) that matrices may have, None for one scale a column of the file; zero_offset: what
    the file takes from a zero point (1 in "gptq", 0 in "gptq_v2"); made_by: the program, as far as it is told."""

    shapes: tuple[tuple[int, int | None], ...]
    zero_offset: int
    desc_act: bool
    made_by: str

    @property
    def name(self) -> str:
        """Such as `gptq-int4-g128`."""
        bits, group = self.shapes[0]
        return f"gptq-int{bits}" + ("" if group is None else f"-g{group}")


def read_gptq_config(folder: Path) -> GptqConfig:
    """From config.json, or the quantize_config.json of older files.

    Raises VL2Error naming the first key that is unknown or asks for what is not converted.
    """
    values = read_json(folder / CONFIG_NAME).get(_KEY)
    if values is None:
        if not (folder / OLD_CONFIG_NAME).is_file():
            raise VL2Error(f"{folder / CONFIG_NAME} has no `{_KEY}`, and {OLD_CONFIG_NAME} is missing",
                           "the folder is not quantized: vl2 quantize makes the codes")
        values = {"quant_method": "gptq", **read_json(folder / OLD_CONFIG_NAME)}
    if not isinstance(values, dict):
        raise VL2Error(f"`{_KEY}` is {values!r}, expected an object")
    if values.get("quant_method") != "gptq":
        raise VL2Error(f"`{_KEY}.quant_method` is {values.get('quant_method')!r}, expected 'gptq'", _hint(values))
    for key in ("bits", "group_size", "sym"):
        if key not in values:
            raise VL2Error(f"`{_KEY}` lacks `{key}`, which says how the codes are packed")
    _check(_KEY, values)
    shapes = [(values["bits"], _group_size(_KEY, values["group_size"])), *_overrides(values)]
    stored_as = values.get("checkpoint_format") or values.get("format") or "gptq"
    return GptqConfig(tuple(dict.fromkeys(shapes)), 1 if stored_as == "gptq" else 0,
                      bool(values.get("desc_act")), _made_by(values))


def _overrides(values: Mapping[str, Any]) -> Iterator[tuple[int, int | None]]:
    """Shapes that single modules have: GPTQModel's `dynamic` by pattern, AutoRound's `extra_config` by name."""
    for key in ("dynamic", "extra_config"):
        for module, given in (values.get(key) or {}).items():
            name = f"{_KEY}.{key}.{module}"
            if module.startswith(_SKIPPED) or given is False:
                continue
            if not isinstance(given, dict):
                raise VL2Error(f"`{name}` is {given!r}, expected an object")
            if given.get("bits") in (16, 32):  # left in floating point
                continue
            _check(name, given)
            group = given.get("group_size", values["group_size"])
            yield given.get("bits", values["bits"]), _group_size(name, group)


def _check(name: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        choices = _VALUES.get(key)
        if choices is None and key not in _PARSED and key not in _TELLING:
            raise VL2Error(
                f"config.json has the unknown key `{name}.{key}` (value {value!r})",
                "vl2 refuses keys it does not know, since they may change what the codes mean; "
                "if this one does not, remove it from a copy of the file",
            )
        if choices is not None and not any(value == c and type(value) is type(c) for c in choices):
            expected = " or ".join(map(repr, choices))
            what = f"`{name}.{key}` is {value!r}, which is not converted; expected {expected}"
            raise VL2Error(what, _REASONS.get(key))


_REASONS = {
    "sym": "asymmetric grids have no form that all of vl2's consumers take: quantize the original with vl2 quantize",
    "bits": "vl2 stores codes of 4 and 8 bits: quantize the original with vl2 quantize",
    "checkpoint_format": "save it again as `gptq` with the program that made it",
    "adapter": "a low-rank correction would be lost: save the checkpoint without it",
}


def _group_size(name: str, value: Any) -> int | None:
    if type(value) is not int or (value < 1 and value != -1):
        raise VL2Error(f"`{name}.group_size` is {value!r}, expected a number of inputs or -1")
    return None if value == -1 else value


def _made_by(values: Mapping[str, Any]) -> str:
    meta = values.get("meta")
    told = meta.get("quantizer") if isinstance(meta, dict) else None
    version = values.get("autoround_version") or values.get("auto_round_version")
    if told:
        return ", ".join(map(str, told)) if isinstance(told, list) else str(told)
    return f"auto_round:{version}" if version else "unknown"


def _hint(values: Mapping[str, Any]) -> str:
    method = str(values.get("quant_method"))
    if method == "compressed-tensors":
        return "vl2 export reads compressed-tensors `pack-quantized` as it is"
    if "auto" in method:
        return 'AutoRound writes this format with format="auto_gptq"'
    return "vl2 converts GPTQ's format only: quantize the original with vl2 quantize"

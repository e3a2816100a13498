"""The `quantization_config` object of config.json, as compressed-tensors 0.15 to 0.20 reads it.

Modules are named by regular expressions that hold for the whole model (`language.model.layers…`) and for its language
part alone (`model.layers…`), which is what transformers can load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vl2.quant.scheme import Scheme
from vl2.quant.vllm import LINEAR, class_level_form
from vl2.quantization import FORMAT, Form, QuantizationConfig

_VERSION = "0.20.0"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def form_of(scheme: Scheme | None) -> Form | None:
    """The form of a matrix by its assigned scheme."""
    return None if scheme is None else Form(scheme.bits, scheme.group_size)


def write_config(forms: Mapping[str, Form | None], for_vllm: bool = False) -> dict[str, Any]:
    """`quantization_config` for the modules of a model; None is a module left as it is.

    for_vllm: the group of the Linears beside the experts comes last and names their class, see `vl2.quant.vllm`.
    """
    of_class = class_level_form(forms) if for_vllm else None
    groups = sorted(
        {form for form in forms.values() if form is not None},
        key=lambda form: (form == of_class, form.bits, form.group_size or 0),
    )
    targets = {form: [LINEAR] if form == of_class else _patterns(forms, form) for form in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "version": _VERSION,
        "config_groups": {f"group_{i}": _group(form, targets[form]) for i, form in enumerate(groups)},
        "ignore": _patterns(forms, None),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def read_config(values: Any, modules: Iterable[str]) -> dict[str, Form | None]:
    """The form of every module by a `quantization_config`: the inverse of `write_config`, for other writers' files too.

    Raises VL2Error on another method or format and on what `Form` cannot say: activations, asymmetric or float grids.
    """
    config = QuantizationConfig.from_dict(values)
    return {module: config.form_of(module) for module in modules}


def _group(form: Form, targets: list[str]) -> dict[str, Any]:
    weights = {"num_bits": form.bits, "type": "int", "symmetric": True, "dynamic": False}
    grouped = {"strategy": "group", "group_size": form.group_size}
    weights |= {"strategy": "channel"} if form.group_size is None else grouped
    return {
        "targets": targets, "weights": weights, "input_activations": None, "output_activations": None, "format": FORMAT
    }  # fmt: skip


def _patterns(forms: Mapping[str, Form | None], wanted: Form | None) -> list[str]:
    """Regular expressions that match the modules of one form and no other module.

    One for each kind of module (its name with the numbers taken out), with the layers listed where they differ.
    """
    kinds: dict[str, set[str]] = {}
    chosen: dict[str, list[str]] = {}
    for module, form in forms.items():
        numbers = _NUMBER.findall(module)
        kind = _NUMBER.sub("#", module)
        kinds.setdefault(kind, set()).add(numbers[0] if numbers else "")
        if form == wanted:
            chosen.setdefault(kind, []).append(numbers[0] if numbers else "")
    return [_pattern(kind, set(first), kinds[kind]) for kind, first in chosen.items()]


def _pattern(kind: str, first_numbers: set[str], all_numbers: set[str]) -> str:
    local = kind.removeprefix("language.model.").removeprefix("language.")
    # transformers takes a group for the experts' if a target says "experts", which these are not
    pattern = re.escape(local).replace(r"\.shared_experts\.", r"\.shared_\w+\.")
    if first_numbers == all_numbers:
        pattern = pattern.replace(r"\#", r"\d+")
    else:
        listed = "|".join(sorted(first_numbers, key=int))
        pattern = pattern.replace(r"\#", f"({listed})", 1).replace(r"\#", r"\d+")
    return f"re:(.*\\.)?{pattern}$"

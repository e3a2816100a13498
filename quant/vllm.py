"""What vLLM's DeepSeek-VL2 class can load, and how `quantization_config` must say it. Read in its source, never run.

The vision tower, projector, head and embeddings are built without quantization. The decoder's attention is built
without its name, so that only a group for the class "Linear" reaches it; such a group takes every Linear that no other
names. Therefore all Linears but the routed experts have one form, or none is quantized. Experts are named by layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from vl2.errors import VL2Error
from vl2.quant.linears import expert_layer, is_router
from vl2.quant.scheme import SCHEMES, Scheme
from vl2.quantization import Form

NAME = "vllm"
LINEAR = "Linear"
_LAYERS = "language.model.layers."
_GROUPS = (None, 32, 64, 128)  # Marlin's


def fit_vllm(schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Scheme | None]:
    """The assigned schemes with one group size for all Linears beside the experts, the largest that fits all of them.

    INT8 takes one scale a row where none of 32, 64 and 128 does. shapes: (N, K) by module. Raises VL2Error naming the
    modules where vLLM could not load what the recipe asks for.
    """
    for module, scheme in schemes.items():
        if scheme is not None and not module.startswith(_LAYERS):
            raise VL2Error(f"vLLM builds `{module}` without quantization, and the recipe makes it {scheme.name}",
                           "leave out --vision, --head and --embeddings, or give it `keep` in the recipe file")
        if scheme is not None and expert_layer(module) is not None and scheme.group_size not in _GROUPS:
            raise VL2Error(f"`{module}` would have groups of {scheme.group_size}, vLLM's experts take 32, 64 or 128",
                           "choose --scheme int8, or `int8-channel` for the experts in a recipe file")
    others = {module: scheme for module, scheme in schemes.items() if _is_other(module)}
    common = _common_scheme(others, math.gcd(*(shapes[module][1] for module in others)))
    return {module: common if module in others else scheme for module, scheme in schemes.items()}


def class_level_form(forms: Mapping[str, Form | None]) -> Form | None:
    """The form that the group for the class "Linear" has; None where only experts are quantized."""
    return next((form for module, form in forms.items() if _is_other(module)), None)


def _is_other(module: str) -> bool:
    return module.startswith(_LAYERS) and expert_layer(module) is None and not is_router(module)


def _common_scheme(others: Mapping[str, Scheme | None], inputs: int) -> Scheme | None:
    (first, expected), *rest = others.items()
    for module, scheme in rest:
        if _name(scheme) != _name(expected):
            raise VL2Error(
                f"vLLM cannot tell `{first}` ({_name(expected)}) from `{module}` ({_name(scheme)}): its attention is "
                "quantized by class, not by name",
                "give all Linears of the decoder beside routers and routed experts one scheme, or `keep` for all",
            )
    if expected is None:
        return None
    group = SCHEMES[expected.name].group_size
    while group is not None and inputs % group:
        group = group // 2 if group // 2 in _GROUPS else None
    if group is None and expected.bits < 8:
        raise VL2Error(f"no group of 32, 64 or 128 divides the inputs of all Linears ({expected.name})",
                       "give them `int8` in the recipe file")
    return replace(expected, group_size=group)


def _name(scheme: Scheme | None) -> str:
    return "keep" if scheme is None else scheme.name

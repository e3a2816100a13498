"""Recipes: which matrix is stored how, as an ordered list of patterns that users can edit.

A recipe file is JSON, `{"name": "mine", "rules": [{"modules": "language.model.layers.*.mlp.experts.*", "scheme":
"int4"}, …]}`. Patterns are shell-style over module names, `*` also matches dots; the first rule that matches decides.
`keep` leaves a matrix as the checkpoint has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from vl2.config import ModelConfig
from vl2.errors import VL2Error
from vl2.json_file import from_json, read_json
from vl2.quant import vllm
from vl2.quant.linears import EMBEDDINGS, HEAD, expert_layer, is_router, matrices
from vl2.quant.scheme import SCHEMES, SMALLEST_GROUP, Scheme, scheme_named

KEEP = "keep"
_ROUTERS = "language.model.layers.*.mlp.gate"
_EXPERTS = "language.model.layers.*.mlp.experts.*"
# Built-in recipes → the scheme of their routed experts.
BUILTIN = {"int8": "int8", "int4": "int4", "int4-g64": "int4-g64", "int4-g128": "int4-g128"}


@dataclass(frozen=True)
class Rule:
    """`modules`: a pattern; `scheme`: a scheme's name or `keep`."""

    modules: str
    scheme: str


@dataclass(frozen=True)
class Recipe:
    """target: None, or "vllm" to keep to what its DeepSeek-VL2 class can load (`vl2.quant.vllm`)."""

    name: str
    rules: tuple[Rule, ...]
    target: str | None = None

    def __post_init__(self) -> None:
        if self.target not in (None, vllm.NAME):
            raise VL2Error(f"recipe `{self.name}` has the target {self.target!r}, expected {vllm.NAME!r} or none")


@dataclass(frozen=True)
class OuterParts:
    """How the parts around the decoder's layers are stored: "fp16" leaves them as they are, or "int8"."""

    vision: str = "fp16"
    lm_head: str = "fp16"
    embeddings: str = "fp16"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value not in ("fp16", "int8"):
                raise VL2Error(f"`{name}` is {value!r}, expected fp16 or int8", "INT4 is offered for no outer part")


def builtin_recipe(name: str, config: ModelConfig, outer: OuterParts | None = None) -> Recipe:
    """The recipe `int8`, `int4`, `int4-g64` or `int4-g128`: experts by the name, other Linears INT8, routers kept.

    One scale a row for the vision tower and the embeddings, whose widths suit no group. Rules that would match nothing
    in this model are left out. Raises VL2Error listing the names when there is none of this one.
    """
    if name not in BUILTIN:
        names = ", ".join(BUILTIN)
        raise VL2Error(f"there is no built-in recipe `{name}`, expected one of {names}", "or give a recipe file")
    outer = outer or OuterParts()
    row_wise = {"fp16": KEEP, "int8": "int8-channel"}
    rules = (
        Rule(_ROUTERS, KEEP),
        Rule(_EXPERTS, BUILTIN[name]),
        Rule("language.model.layers.*", "int8"),
        Rule(HEAD, {"fp16": KEEP, "int8": "int8"}[outer.lm_head]),
        Rule(EMBEDDINGS, row_wise[outer.embeddings]),
        Rule("projector.*", KEEP),
        Rule("vision.*", row_wise[outer.vision]),
    )
    modules = list(matrices(config))
    return Recipe(name, tuple(rule for rule in rules if any(fnmatchcase(module, rule.modules) for module in modules)))


def read_recipe(path: Path) -> Recipe:
    """Raises VL2Error naming file and place on unknown keys, wrong types and unknown schemes."""
    recipe = from_json(Recipe, read_json(path), str(path))
    for index, rule in enumerate(recipe.rules):
        if rule.scheme != KEEP:
            try:
                scheme_named(rule.scheme)
            except VL2Error as error:
                raise VL2Error(f"{path}: rules[{index}]: {error.message}, or {KEEP}") from error
    return recipe


def assign_schemes(recipe: Recipe, config: ModelConfig) -> dict[str, Scheme | None]:
    """The scheme of every matrix of the model with the group size it gets, None for `keep`.

    The group size follows `Scheme.group_for`; experts of a layer take the one that divides all their inputs.

    Raises VL2Error on a matrix that no rule matches, a rule that decides nothing, a quantized router, an INT4 head or
    embedding, inputs that no INT4 group divides, experts of one layer under several schemes, and what the recipe's
    target cannot load.
    """
    shapes = matrices(config)
    decided = {module: _first_match(recipe, module) for module in shapes}
    for index, rule in enumerate(recipe.rules):
        if index not in decided.values():
            raise VL2Error(
                f"recipe `{recipe.name}`: rule {index + 1} (`{rule.modules}`) decides nothing in this model",
                "remove it, or move it before the rule that takes its modules",
            )
    assigned = {module: _scheme(recipe.rules[index]) for module, index in decided.items()}
    for module, scheme in assigned.items():
        _check_allowed(module, scheme)
    _check_experts(assigned)
    common = _common_inputs(shapes)
    fitted = {
        module: _fitted(module, scheme, common.get(expert_layer(module), shapes[module][1]))
        for module, scheme in assigned.items()
    }
    return vllm.fit_vllm(fitted, shapes) if recipe.target == vllm.NAME else fitted


def fell_back(scheme: Scheme) -> bool:
    """Whether an assigned scheme has another group size than its name says."""
    return scheme.group_size != SCHEMES[scheme.name].group_size


def _first_match(recipe: Recipe, module: str) -> int:
    for index, rule in enumerate(recipe.rules):
        if fnmatchcase(module, rule.modules):
            return index
    raise VL2Error(
        f"recipe `{recipe.name}` has no rule for `{module}`", f'add a rule, such as "{module}" with the scheme "{KEEP}"'
    )


def _scheme(rule: Rule) -> Scheme | None:
    return None if rule.scheme == KEEP else scheme_named(rule.scheme)


def _common_inputs(shapes: Mapping[str, tuple[int, int]]) -> dict[int | None, int]:
    """Per layer the greatest common divisor of its experts' inputs."""
    common: dict[int | None, int] = {}
    for module, (_, inputs) in shapes.items():
        layer = expert_layer(module)
        if layer is not None:
            common[layer] = math.gcd(common.get(layer, 0), inputs)
    return common


def _fitted(module: str, scheme: Scheme | None, inputs: int) -> Scheme | None:
    if scheme is None or scheme.group_size is None:
        return scheme
    try:
        group = scheme.group_for(inputs)
    except VL2Error as error:
        raise VL2Error(f"`{module}`: {error.message}", error.hint) from error
    return replace(scheme, group_size=group if inputs % SMALLEST_GROUP == 0 else None)


def _check_allowed(module: str, scheme: Scheme | None) -> None:
    if scheme is None:
        return
    if is_router(module):
        raise VL2Error(
            f"the recipe quantizes the router `{module}`", f'give it "{KEEP}": rounding it changes which experts run'
        )
    if module in (HEAD, EMBEDDINGS) and scheme.bits < 8:
        raise VL2Error(f"the recipe stores `{module}` as {scheme.name}", f"expected int8, int8-channel or {KEEP}")


def _check_experts(assigned: Mapping[str, Scheme | None]) -> None:
    """No consumer takes experts of one layer in several schemes: they are stacked or sorted into one kernel."""
    seen: dict[int, tuple[str, Scheme | None]] = {}
    for module, scheme in assigned.items():
        layer = expert_layer(module)
        if layer is None:
            continue
        first, expected = seen.setdefault(layer, (module, scheme))
        if scheme != expected:
            both = f"`{first}` {_name(expected)}, `{module}` {_name(scheme)}"
            raise VL2Error(f"the experts of layer {layer} have two schemes: {both}", "give all of a layer the same")


def _name(scheme: Scheme | None) -> str:
    return KEEP if scheme is None else scheme.name

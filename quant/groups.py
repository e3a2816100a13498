"""The groups of matrices that a budget decides on, and the recipe that a decision is.

A group is what consumers want stored alike: the routed experts of a layer, its attention, its shared experts or dense
feed-forward; lm_head; the token table; the vision tower. Routers and the projector are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vl2.config import ModelConfig
from vl2.quant.linears import EMBEDDINGS, HEAD, is_router, matrices
from vl2.quant.parts import Part
from vl2.quant.recipe import KEEP, Recipe, Rule, assign_schemes
from vl2.quant.scheme import Scheme

_LAYER = "language.model.layers.{}"
# It feeds the cache of every later token: never below INT8.
_LATENT = "self_attn.kv_a_proj_with_mqa"
_EXPERT_OPTIONS = (KEEP, "int8", "int4", "int4-g64", "int4-g128")
_LINEAR_OPTIONS = (KEEP, "int8", "int4")
_OUTER_OPTIONS = {"vision": (KEEP, "int8-channel"), "lm_head": (KEEP, "int8"), "embeddings": (KEEP, "int8-channel")}
_OUTER_MODULES = {"vision": "vision.*", "lm_head": HEAD, "embeddings": EMBEDDINGS}
_OUTER_STAGES = {"vision": "vision", "lm_head": "head", "embeddings": "embeddings"}


@dataclass(frozen=True)
class Group:
    """part: where its matrices are quantized; options: schemes or `keep`, the largest first."""

    name: str
    part: Part
    modules: str
    options: tuple[str, ...]

    def members(self, config: ModelConfig) -> list[str]:
        """Its matrices."""
        return [module for module in matrices(config) if fnmatchcase(module, self.modules) and not is_router(module)]

    def rules(self, option: str) -> tuple[Rule, ...]:
        """The recipe's rules that store the group so."""
        latent = self.modules.replace("self_attn.*", _LATENT)
        first = (Rule(latent, "int8"),) if latent != self.modules and option.startswith("int4") else ()
        return (*first, Rule(self.modules, option))


def decision_groups(config: ModelConfig, outer: Mapping[str, str]) -> list[Group]:
    """All groups of a model; outer: "fp16" or "int8" by part ("vision", "lm_head", "embeddings") where the user has
    decided. Options that store a group the same way as an earlier one are left out."""
    language, groups = config.language_config, []
    for l in range(language.num_hidden_layers):
        prefix = _LAYER.format(l)
        groups.append(Group(f"layer {l} attention", Part("attention", l), f"{prefix}.self_attn.*", _LINEAR_OPTIONS))
        if not language.is_moe(l):
            groups.append(Group(f"layer {l} dense", Part("mlp", l), f"{prefix}.mlp.*", _LINEAR_OPTIONS))
            continue
        if language.n_shared_experts:
            shared = f"{prefix}.mlp.shared_experts.*"
            groups.append(Group(f"layer {l} shared experts", Part("mlp", l), shared, _LINEAR_OPTIONS))
        experts = f"{prefix}.mlp.experts.*"
        groups.append(Group(f"layer {l} experts", Part("mlp", l), experts, _EXPERT_OPTIONS))
    for name, options in _OUTER_OPTIONS.items():
        if name in outer:
            options = (options[0 if outer[name] == "fp16" else 1],)
        groups.append(Group(name, Part(_OUTER_STAGES[name]), _OUTER_MODULES[name], options))
    return [_without_repeats(group, config) for group in groups if group.members(config)]


def decided_recipe(name: str, groups: list[Group], chosen: Mapping[str, str], config: ModelConfig) -> Recipe:
    """The recipe with the option of each group by its name; groups that `chosen` leaves out are kept."""
    rules = [Rule(_LAYER.format("*") + ".mlp.gate", KEEP)]
    for group in groups:
        rules.extend(group.rules(chosen.get(group.name, KEEP)))
    rules.append(Rule("projector.*", KEEP))
    modules, taken, used = list(matrices(config)), set(), []
    for rule in rules:
        found = {module for module in modules if fnmatchcase(module, rule.modules)} - taken
        taken |= found
        used.extend([rule] if found else [])
    return Recipe(name, tuple(used))


def option_schemes(group: Group, option: str, config: ModelConfig) -> dict[str, Scheme | None]:
    """The scheme of every matrix with only this group so, all others kept."""
    return assign_schemes(decided_recipe("one group", [group, _REST], {group.name: option}, config), config)


def _without_repeats(group: Group, config: ModelConfig) -> Group:
    seen: dict[tuple, str] = {}
    for option in group.options:
        schemes = option_schemes(group, option, config)
        form = tuple((module, scheme and (scheme.bits, scheme.group_size)) for module, scheme in schemes.items())
        seen.setdefault(form, option)
    return Group(group.name, group.part, group.modules, tuple(seen.values()))


# Keeps what a single group leaves undecided.
_REST = Group("the rest", Part("head"), "*", (KEEP,))

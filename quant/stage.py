"""One part of a checkpoint from weights to codes: folds first, then every matrix by its site's statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vl2.errors import VL2Error
from vl2.quant.affine import SMALLEST_SCALE, Quantized
from vl2.quant.fold import Stage, fold_norms, fold_unit, search_norm_scales
from vl2.quant.linears import HEAD, WEIGHT, expert_of
from vl2.quant.method import METHODS, Method, quantize_weight
from vl2.quant.parts import Part
from vl2.quant.recipe import fell_back
from vl2.quant.scheme import Scheme
from vl2.quant.sites import Site, Unit, layer_units, router_of
from vl2.quant.source import Source
from vl2.quant.statistics import Statistics
from vl2.quant.tower import TowerStatistics

Report = Callable[[str], None]
HEAD_SITE = "lm_head.input"  # of calibration's last file


@dataclass(frozen=True)
class MatrixReport:
    """How one matrix fared. Errors are of its output on the calibration statistics (of its weights without any).

    `over_rtn`: error over rounding's, for all Linears quantized together; `tokens`: that reached it (an expert's `down`
    with those that nearly did, by their weight); `smallest_scales`: scales raised to the smallest that is stored;
    `fell_back`: the group is not the scheme's (`Scheme.group_for`).
    """

    module: str
    scheme: str
    group_size: int | None
    method: str
    relative_error: float
    over_rtn: float
    tokens: int
    smallest_scales: int
    fell_back: bool


@dataclass
class PartResult:
    """Codes by module, tensors that a fold changed by their full name (float32), and the reports."""

    quantized: dict[str, Quantized] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    reports: list[MatrixReport] = field(default_factory=list)


def leaning_experts(reports: Iterable[MatrixReport], hidden_size: int) -> dict[str, list[int]]:
    """Layer → experts with fewer tokens than inputs: in `blend_with_layer` the layer's Hessian outweighs their own."""
    leaning: dict[str, list[int]] = {}
    for report in reports:
        expert = expert_of(report.module)
        if expert is not None and report.module.endswith(".gate_proj") and report.tokens < hidden_size:
            leaning.setdefault(str(expert[0]), []).append(expert[1])
    return leaning


class PartTensors(Mapping[str, Tensor]):
    """What became of a part by the checkpoint's names, float32: folded, or dequantized each time it is asked for."""

    def __init__(self, result: PartResult):
        self._result = result

    def __getitem__(self, name: str) -> Tensor:
        folded = self._result.folded
        return folded[name] if name in folded else self._result.quantized[name.removesuffix(WEIGHT)].dequantize()

    def __contains__(self, name: object) -> bool:
        return name in self._result.folded or str(name).removesuffix(WEIGHT) in self._result.quantized

    def __iter__(self) -> Iterator[str]:
        yield from self._result.folded
        yield from (module + WEIGHT for module in self._result.quantized)

    def __len__(self) -> int:
        return len(self._result.folded) + len(self._result.quantized)


def quantize_part(stage: Stage, part: Part, modules: Iterable[str], report: Report) -> PartResult:
    """A part as its job wants it: a layer or head by its statistics where there are any, all else each by itself.

    modules: the part's matrices in the file's order.
    """
    if stage.statistics is None or isinstance(stage.statistics, TowerStatistics):
        schemes = {module: stage.schemes[module] for module in modules if stage.schemes.get(module) is not None}
        return quantize_plain(stage.source, schemes, stage.method, report, stage.statistics)
    if part.stage == "head":
        return quantize_stage(stage, [Unit((Site(HEAD_SITE, (HEAD,)),))], None, report)
    language = stage.source.config.language_config
    units = layer_units(language, part.layer, part.stage)
    return quantize_stage(stage, units, router_of(language, part.layer, part.stage), report)


def quantize_plain(
    source: Source, schemes: Mapping[str, Scheme], method: Method, report: Report, tower: TowerStatistics | None = None
) -> PartResult:
    """Every module of `schemes` for itself, without statistics or by the tower's; methods that need whole Hessians fall
    to searched scales."""
    method = METHODS["search"] if method.needs_statistics else method
    result = PartResult()
    for module, scheme in schemes.items():
        statistics = None if tower is None else tower.of(module)
        _quantize_together(result, {module: source.weight(module)}, statistics, scheme, method)
        report(module)
    return result


def quantize_stage(stage: Stage, units: list[Unit], router: str | None, report: Report) -> PartResult:
    """A decoder layer's attention or mlp by its statistics, one unit's weights in memory at a time.

    router: the module that reads the mlp's input beside the units, or None.
    """
    result, method = PartResult(), stage.method
    norm_scales = search_norm_scales(stage, units) if method.folds else {}
    result.folded |= fold_norms(stage, norm_scales, router)
    for unit in units:
        weights = {module: stage.source.weight(module) for module in unit.modules}
        scales: dict[str, Tensor] = {}
        if method.folds:
            scales, biases = fold_unit(stage, unit, weights, norm_scales)
            result.folded |= biases
        for site in unit.sites:
            _quantize_site(stage, site, weights, scales.get(site.name), (method, result))
        for module in unit.modules:
            report(module)
    return result


def _quantize_site(
    stage: Stage, site: Site, weights: Mapping[str, Tensor], scale: Tensor | None, into: tuple[Method, PartResult]
) -> None:
    method, result = into
    statistics = stage.regularised(site)
    if scale is not None:
        statistics = statistics.scaled_inputs(scale)
    for scheme, modules in _by_scheme(stage.schemes, site.consumers):
        _quantize_together(result, {module: weights[module] for module in modules}, statistics, scheme, method)


def _by_scheme(schemes: Mapping[str, Scheme | None], modules: tuple[str, ...]) -> Iterator[tuple[Scheme, list[str]]]:
    groups: dict[Scheme, list[str]] = {}
    for module in modules:
        scheme = schemes[module]
        if scheme is not None:
            groups.setdefault(scheme, []).append(module)
    yield from groups.items()


def _quantize_together(
    result: PartResult, weights: Mapping[str, Tensor], statistics: Statistics | None, scheme: Scheme, method: Method
) -> None:
    """Rows of several Linears as one matrix: they share inputs, so one Hessian and one factorisation."""
    try:
        choice = quantize_weight(_stacked(list(weights.values())), statistics, scheme, method)
    except VL2Error as error:
        raise VL2Error(f"`{next(iter(weights))}`: {error.message}", error.hint) from error
    rows = [len(weight) for weight in weights.values()]
    parts = zip(choice.quantized.codes.split(rows), choice.quantized.scales.split(rows), strict=True)
    for module, (codes, scales), relative in zip(weights, parts, choice.relative_errors(rows), strict=True):
        result.quantized[module] = Quantized(codes, scales, scheme.bits)
        result.reports.append(MatrixReport(
            module=module, scheme=scheme.name, group_size=scheme.group_size, method=choice.method,
            relative_error=relative, over_rtn=choice.over_rtn,
            tokens=0 if statistics is None else statistics.tokens,
            smallest_scales=int((scales.float() == SMALLEST_SCALE).sum()), fell_back=fell_back(scheme),
        ))  # fmt: skip


def _stacked(weights: list[Tensor]) -> Tensor:
    """One matrix of all rows; a single one is not copied, for it may be an lm_head."""
    return weights[0] if len(weights) == 1 else torch.cat(weights)

"""How much the predictions suffer from each group of matrices and each way to store it, measured.

A group's sensitivity is the mean KLD of the next token, at the text positions of the calibration set's first sequences,
of the model with only this group changed: a version in `vl2.calib.variants`. A model that the asked method quantizes in
minutes is measured at every option, by this method. A larger one is rounded to nearest instead, and only each group's
smallest option goes through all layers; the others take its KLD times the ratio of the squared errors that they make in
the states behind their stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vl2.cli.progress import WorkProgress

if TYPE_CHECKING:
    from vl2.calib.data import CheckedSample
    from vl2.calib.variants import Birth, Divergence, Excerpt, Variants
    from vl2.quant.groups import Group
    from vl2.quant.quantizer import QuantizeOptions
    from vl2.quant.scheme import Scheme
    from vl2.quant.stage import PartResult

Schemes = Mapping[str, "Scheme | None"]
_MOST_TOKENS, _FEWEST_TOKENS = 8192, 512
_STATE_BYTES = 8e8  # of all versions together; a copy of it is made in a layer with experts
# Floating-point operations: of sending versions through the layers, and of quantizing every option by the method.
_FORWARD_WORK, _METHOD_WORK = 8e13, 2e12


@dataclass(frozen=True)
class BudgetJob:
    """size_of: bytes of the result by the schemes of all matrices; outer: "fp16" or "int8" by part, where the user has
    decided; samples: the calibration set's conversations with their images, None where they are not at hand."""

    checkpoint: Path
    calibration: Path
    budget_bytes: int
    options: QuantizeOptions
    size_of: Callable[[Schemes], int]
    outer: Mapping[str, str] = field(default_factory=dict)
    samples: Sequence[CheckedSample] | None = None


@dataclass(frozen=True)
class Plan:
    """probes: group → the options that go through all layers; method: what sensitivities are quantized by."""

    groups: list[Group]
    probes: Mapping[str, tuple[str, ...]]
    method: str
    excerpt: Excerpt


@dataclass(frozen=True)
class Measured:
    """How much is measured. probes, method: as of `Plan`; tokens: at most, of the calibration set's first sequences;
    quantizing: operations of doing that to all layers."""

    probes: Mapping[str, tuple[str, ...]]
    method: str
    tokens: int
    quantizing: float

    @property
    def versions(self) -> int:
        """Of the model, the original among them."""
        return 1 + sum(map(len, self.probes.values()))


def measured(job: BudgetJob, groups: list[Group]) -> Measured:
    """All options by the asked method, or the smallest ones by rounding."""
    from vl2.calib.variants import token_work
    from vl2.quant.demands import layer_work
    from vl2.quant.groups import decided_recipe
    from vl2.quant.method import method_named
    from vl2.quant.recipe import assign_schemes
    from vl2.quant.source import Source

    config = Source(job.checkpoint).config
    smallest = assign_schemes(decided_recipe("", groups, {g.name: g.options[-1] for g in groups}, config), config)
    asked = method_named(job.options.method)
    quantizing = 3 * layer_work(config, smallest, asked)
    affordable = quantizing < _METHOD_WORK
    probes = {group.name: tuple(option for option in group.options if option != "keep") for group in groups}
    if not affordable:
        probes = {name: options[-1:] for name, options in probes.items()}
        quantizing = 3 * layer_work(config, smallest, method_named("rtn"))
    versions = 1 + sum(map(len, probes.values()))
    most = min(_FORWARD_WORK / (versions / 2 * token_work(config.language_config)),
               _STATE_BYTES / (versions * config.language_config.hidden_size * 4), _MOST_TOKENS)
    method = job.options.method if affordable else "rtn"
    return Measured(probes, method, int(max(most, _FEWEST_TOKENS)), quantizing)


def measurement_work(job: BudgetJob, groups: list[Group], tokens: int) -> float:
    """Floating-point operations of `measure_groups` with a calibration set of so many tokens: versions through the
    layers, each option once through its stage, and logits, as if a third of the tokens were text."""
    from vl2.calib.variants import token_work
    from vl2.quant.source import Source

    language, found = Source(job.checkpoint).config.language_config, measured(job, groups)
    options = sum(len(group.options) - 1 for group in groups if group.part.layer is not None)
    through = found.versions / 2 + options / (2 * language.num_hidden_layers)
    logits = found.versions / 3 * 2.0 * language.vocab_size * language.hidden_size
    return min(found.tokens, tokens) * (through * token_work(language) + logits) + found.quantizing


def plan_measurement(job: BudgetJob, groups: list[Group]) -> Plan:
    """As `measured`, with the tokens."""
    from vl2.calib.variants import read_excerpt

    found = measured(job, groups)
    return Plan(groups, found.probes, found.method, read_excerpt(job.checkpoint, job.calibration, found.tokens))


def measure_groups(job: BudgetJob, work: Path, groups: list[Group]) -> dict[str, Any]:
    """"klds": group → option → KLD; and what they were measured with. work: a folder for the statistics."""
    from vl2.calib.statistics import TEXT
    from vl2.calib.variants import Variants

    plan = plan_measurement(job, groups)
    click.echo(f"measuring {sum(map(len, plan.probes.values()))} versions of the model on {len(plan.excerpt.hidden)} "
               f"tokens, quantized by {plan.method}", err=True)
    run = _Run(job, plan, Variants(job.checkpoint, plan.excerpt, sum(map(len, plan.probes.values()))))
    for name in ("embeddings", "vision"):
        run.start(name)
    head = run.through_layers(work)
    divergences = run.variants.divergences({_key("lm_head", option): ("original", tensors)
                                            for option, tensors in run.head_versions(head)})
    return {"method": plan.method, "tokens": len(plan.excerpt.hidden),
            "text_positions": int((plan.excerpt.modality == TEXT).sum()), "unmeasured": run.unmeasured,
            "klds": _klds(plan, run.changes, divergences)}


def measure_checkpoint(job: BudgetJob, groups: list[Group], quantized: Path) -> dict[str, Any]:
    """The KLD of a finished checkpoint at the positions where sensitivities were measured, and its standard error."""
    from vl2.calib.variants import Variants
    from vl2.quant.checkpoint import QuantizedCheckpoint

    made = QuantizedCheckpoint(quantized)
    plan = plan_measurement(job, groups)
    variants = Variants(job.checkpoint, plan.excerpt, 1)
    variants.start("quantized", _embeddings(job, plan.excerpt, made.forms, made.tensors)[0])
    for l in range(made.config.language_config.num_hidden_layers):
        for stage in ("attention", "mlp"):
            variants.advance_alone("quantized", l, stage, made.tensors)
    found = variants.divergences({"quantized": ("quantized", made.tensors)})["quantized"]
    return {"measured_kld": found.kld, "measured_kld_error": found.error}


class _Run:
    """One measurement: versions, and the change that each option makes behind its stage."""

    def __init__(self, job: BudgetJob, plan: Plan, variants: Variants):
        from vl2.quant.source import Source

        self.job, self.plan, self.variants = job, plan, variants
        self.source = Source(job.checkpoint)
        self.changes: dict[str, float] = {}
        self.unmeasured: list[str] = []
        self.progress = WorkProgress()

    def start(self, name: str) -> None:
        """The versions of the token table or the tower, which differ from the beginning."""
        group = self._group(name)
        for option in self.plan.probes[name] if group else ():
            made = self._quantized(group, option)
            hidden, whole = _embeddings(self.job, self.plan.excerpt, made.quantized, _tensors(made))
            if whole:
                self.variants.start(_key(name, option), hidden)
            else:
                self.unmeasured.append(name)

    def through_layers(self, work: Path) -> Path | None:
        """All layers; returns the statistics of lm_head's input where the method needs statistics."""
        from vl2.calib.stream import stream_layers
        from vl2.quant.method import method_named

        layers = self.source.config.language_config.num_hidden_layers
        if not method_named(self.plan.method).needs_statistics:
            for l in range(layers):
                for stage in ("attention", "mlp"):
                    self._stage(l, stage, None)
            return None
        shutil.rmtree(work / "stream", ignore_errors=True)
        stream = stream_layers(self.job.checkpoint, self.job.calibration, work / "stream", self._stage)
        return stream.head_statistics

    def head_versions(self, statistics: Path | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        group = self._group("lm_head")
        for option in self.plan.probes["lm_head"] if group else ():
            yield option, _tensors(self._quantized(group, option, statistics))

    def _stage(self, l: int, stage: str, statistics: Path | None) -> dict[str, Any]:
        layers = self.source.config.language_config.num_hidden_layers
        self.progress.tell(f"sensitivity, layer {l}: {stage}", (2 * l + (stage == "mlp")) / (2 * layers))
        self.changes |= self.variants.advance(l, stage, self._births(l, stage, statistics))
        return {}

    def _births(self, l: int, stage: str, statistics: Path | None) -> Iterator[Birth]:
        from vl2.calib.variants import Birth

        for group in self.plan.groups:
            if (group.part.layer, group.part.stage) != (l, stage):
                continue
            for option in group.options:
                if option != "keep":
                    tensors = _tensors(self._quantized(group, option, statistics))
                    yield Birth(_key(group.name, option), tensors, option in self.plan.probes[group.name])

    def _quantized(self, group: Group, option: str, statistics: Path | None = None) -> PartResult:
        from vl2.quant.fold import Stage
        from vl2.quant.groups import option_schemes
        from vl2.quant.method import method_named
        from vl2.quant.stage import quantize_part
        from vl2.quant.statistics import LayerStatistics

        schemes = option_schemes(group, option, self.source.config)
        found = None if statistics is None else LayerStatistics(statistics)
        stage = Stage(self.source, found, schemes, method_named(self.plan.method))
        modules = [module for module, scheme in schemes.items() if scheme is not None]
        return quantize_part(stage, group.part, modules, lambda module: None)

    def _group(self, name: str) -> Group | None:
        return next((group for group in self.plan.groups if group.name == name), None)


def _tensors(made: PartResult) -> Mapping[str, Any]:
    from vl2.quant.stage import PartTensors

    return PartTensors(made)


def _embeddings(
    job: BudgetJob, excerpt: Excerpt, forms: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[Any, bool]:
    """The excerpt's embeddings [T, H] by a quantized tower and token table; False: not the tower's, as the images are
    not at hand.

    A table with one scale a row gives every row by itself: rounding the rows that were taken is rounding the table.
    """
    from vl2.calib.embed import embed_again
    from vl2.calib.statistics import IMAGE, TEXT
    from vl2.calib.variants import with_rows_of
    from vl2.quant.imatrix import imatrix
    from vl2.quant.linears import EMBEDDINGS
    from vl2.quant.scheme import scheme_named

    made, with_tower = excerpt, any(forms[module] is not None for module in forms if module.startswith("vision."))
    if with_tower and job.samples is not None:
        hidden = embed_again(job.checkpoint, job.samples[: len(excerpt.spans)], tensors)
        made = replace(made, hidden=with_rows_of(made, IMAGE, hidden))
    if forms.get(EMBEDDINGS) is not None:
        rows = imatrix(made.hidden, None, scheme_named("int8-channel")).dequantize()
        made = replace(made, hidden=with_rows_of(made, TEXT, rows))
    return made.hidden, job.samples is not None or not with_tower


def _klds(plan: Plan, changes: Mapping[str, float], found: Mapping[str, Divergence]) -> dict[str, dict[str, float]]:
    klds: dict[str, dict[str, float]] = {}
    for group in plan.groups:
        own = klds.setdefault(group.name, {})
        for option in group.options:
            key = _key(group.name, option)
            if option == "keep":
                own[option] = 0.0
            elif key in found:
                own[option] = max(found[key].kld, 0.0)
            elif key in changes:
                probe = _key(group.name, plan.probes[group.name][-1])
                own[option] = max(found[probe].kld, 0.0) * changes[key] / max(changes[probe], 1e-30)
            else:
                own[option] = 0.0
    return klds


def _key(group: str, option: str) -> str:
    return f"{group} as {option}"

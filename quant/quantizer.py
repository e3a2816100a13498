"""A checkpoint into a quantized one, part by part: bounded memory, resumable, renamed into place whole.

Beside OUT lies `OUT.partial/` while the job runs: one shard and one report a finished part, `job.json`, which says what
the folder was begun with, and `stream/`, which is calibration's to work in.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vl2.config import ModelConfig
from vl2.errors import VL2Error
from vl2.json_file import from_json, read_json, to_json
from vl2.quant.checkpoint import TensorReader, packed_tensors
from vl2.quant.fold import Stage
from vl2.quant.linears import WEIGHT, matrices
from vl2.quant.method import METHODS, method_named
from vl2.quant.parts import Part, split_parts
from vl2.quant.publish import check_place, publish, put_in_place
from vl2.quant.quantization_config import form_of
from vl2.quant.recipe import OuterParts, Recipe, assign_schemes, builtin_recipe, read_recipe
from vl2.quant.scheme import Scheme
from vl2.quant.shard import write_shard, write_text
from vl2.quant.source import Source
from vl2.quant.stage import MatrixReport, PartResult, leaning_experts, quantize_part
from vl2.quant.statistics import LayerStatistics
from vl2.quant.tower import TowerStatistics
from vl2.safetensors_file import read_header

Progress = Callable[[str, int, int], None]
_JOB_NAME = "job.json"


@dataclass(frozen=True)
class QuantizeOptions:
    """recipe: a built-in name or the path of a recipe file; outer: for built-in recipes only; method: of `METHODS`;
    calibration: what the statistics were made from, for quantization.json and the model card, flat; force: replace an
    existing output; target: "vllm", or None for the recipe's own; budget: how a budget chose the recipe, for
    quantization.json.
    """

    recipe: str = "int4"
    outer: OuterParts = field(default_factory=OuterParts)
    method: str = "search"
    calibration: Mapping[str, Any] | None = None
    force: bool = False
    target: str | None = None
    budget: Mapping[str, Any] | None = None


def quantize_checkpoint(
    source: Path, out: Path, options: QuantizeOptions | None = None, progress: Progress | None = None
) -> Path:
    """Quantizes a checkpoint folder without calibration; returns `out`, a compressed-tensors checkpoint.

    progress(module, done, total) is called after each matrix, in weights. Raises VL2Error on an existing `out` (unless
    forced), a partial one begun otherwise, a method that needs calibration, and as the recipe and the checkpoint do.
    """
    options = options or QuantizeOptions()
    if method_named(options.method).needs_statistics:
        without = ", ".join(name for name, method in METHODS.items() if not method.needs_statistics)
        raise VL2Error(
            f"the method `{options.method}` needs calibration statistics", f"calibrate first, or choose {without}"
        )
    quantizer = Quantizer(source, out, options, progress)
    for part in quantizer.parts:
        quantizer.quantize_part(part)
    return quantizer.finish()


class Quantizer:
    """One job. `quantize_layer` is what calibration's stream calls back; `finish` does what no layer covers."""

    def __init__(self, source: Path, out: Path, options: QuantizeOptions, progress: Progress | None = None):
        self.source, self.out, self.options = Source(source), Path(out), options
        self.recipe = recipe_for(options, self.source.config)
        self.method = method_named(options.method)
        self.schemes = quantizing_schemes(self.recipe, self.source.config)
        self.parts = split_parts(self.source.entries)
        self._work = self.out.with_name(self.out.name + ".partial")
        self.stream_dir = self._work / "stream"
        self._progress = progress
        self._done, self._counted = 0, self._weights_of(self.parts)
        self._begin()

    def quantize_layer(self, layer: int, stage: str, statistics: Path) -> Mapping[str, Tensor]:
        """The tensors of a layer's stage ("attention" or "mlp"), dequantized float32, by the checkpoint's names.

        Codes go into the layer's shard; the mapping reads and dequantizes a tensor each time it is asked for one. What
        folds changed (norms, the router) is among them. A part that is done already is read back.
        """
        part = Part(stage, layer)
        self.quantize_part(part, LayerStatistics(statistics))
        forms = {module: form_of(scheme) for module, scheme in self.schemes.items()}
        return TensorReader(read_header(self._shard(part)), forms)

    def quantize_part(self, part: Part, statistics: LayerStatistics | TowerStatistics | None = None) -> None:
        """Quantizes and writes one part, unless an interrupted run did. Layers without statistics: searched scales."""
        if part not in self.parts:
            raise VL2Error(f"the checkpoint has no {part}", f"its parts are {', '.join(map(str, self.parts))}")
        if self._report_file(part).exists():
            self._done += sum(self._weights_of([part]).values())  # without a report: a rate would take it for fast work
            return
        result = self._result(part, statistics)
        write_shard(self._shard(part), self._tensors(part, result))
        write_text(self._report_file(part), json.dumps(to_json(result.reports)))

    def finish(
        self, head_statistics: Path | None = None, coverage: Mapping[str, Any] | None = None, tower: Path | None = None
    ) -> Path:
        """Quantizes the parts around the layers, writes index, configuration and card, and renames into place.

        head_statistics: calibration's file with the site `lm_head.input`, if there is one; coverage: its account of the
        tokens by expert, for quantization.json; tower: the calibration set, which says how large the inputs of the
        tower's Linears are. Progress is of these parts alone. Raises VL2Error naming the first layer that was not
        quantized.
        """
        left = [part for part in self.parts if part.layer is None and not self._report_file(part).exists()]
        self._done, self._counted = 0, self._weights_of(left)
        measured: dict[str, LayerStatistics | TowerStatistics] = {}
        if head_statistics is not None:
            measured["head"] = LayerStatistics(head_statistics)
        if tower is not None:
            measured["vision"] = TowerStatistics(tower)
        for part in self.parts:
            if part.layer is None:
                self.quantize_part(part, measured.get(part.stage))
            elif not self._report_file(part).exists():
                raise VL2Error(f"{part} was not quantized", "run the calibration to its end")
        reports = [report for part in self.parts for report in self._read_reports(part)]
        shards = {self._shard(part).name: read_header(self._shard(part)) for part in self.parts}
        publish(self.source, self._work, shards, self.description(reports) | {"coverage": coverage})
        put_in_place(self._work, self.out, [_JOB_NAME, *(self._report_file(part).name for part in self.parts)])
        shutil.rmtree(self.out / self.stream_dir.name, ignore_errors=True)
        return self.out

    def description(self, reports: list[MatrixReport]) -> dict[str, Any]:
        """What `quantization.json` says of the job."""
        forms = {module: form_of(scheme) for module, scheme in self.schemes.items()}
        return {
            "recipe": self.recipe, "method": self.options.method, "calibration": self.options.calibration,
            "leaning_experts": self._leaning_experts(reports), "forms": forms, "matrices": reports,
            **({"budget": self.options.budget} if self.options.budget is not None else {}),
        }  # fmt: skip

    def _leaning_experts(self, reports: list[MatrixReport]) -> dict[str, list[int]]:
        """By layer; empty where no Hessian was looked at."""
        if self.options.calibration is None or not (self.method.folds or self.method.candidates):
            return {}
        return leaning_experts(reports, self.source.config.language_config.hidden_size)

    def _result(self, part: Part, statistics: LayerStatistics | TowerStatistics | None) -> PartResult:
        modules = [name.removesuffix(WEIGHT) for name in self.parts[part] if name.endswith(WEIGHT)]
        stage = Stage(self.source, statistics, self.schemes, self.method)
        return quantize_part(stage, part, modules, self._count)

    def _tensors(self, part: Part, result: PartResult) -> dict[str, Tensor]:
        """The part's tensors in the source's order, packed, folded or as they were."""
        tensors: dict[str, Tensor] = {}
        for name in self.parts[part]:
            module = name.removesuffix(WEIGHT)
            if name.endswith(WEIGHT) and module in result.quantized:
                tensors |= packed_tensors(module, result.quantized[module])
            else:
                tensors[name] = result.folded[name] if name in result.folded else self.source.tensor(name)
        return tensors

    def _begin(self) -> None:
        check_place(self.out, self.options.force)
        job = {
            "source": self.source.fingerprint(), "recipe": to_json(self.recipe), "method": self.options.method,
            "calibration": to_json(self.options.calibration),
        }  # fmt: skip
        path = self._work / _JOB_NAME
        self._work.mkdir(parents=True, exist_ok=True)
        if not any(self._work.iterdir()):  # new, or made by who holds it
            write_text(path, json.dumps(job))
        elif not path.exists() or read_json(path) != json.loads(json.dumps(job)):
            raise VL2Error(
                f"{self._work} was begun from another checkpoint or with other options",
                "remove it to begin anew, or repeat the command it was begun with",
            )

    def _weights_of(self, parts: Iterable[Part]) -> dict[str, int]:
        """The matrices of some parts that are quantized, and the weights of each."""
        shapes = matrices(self.source.config)
        modules = (name.removesuffix(WEIGHT) for part in parts for name in self.parts[part])
        return {module: math.prod(shapes[module]) for module in modules if self.schemes.get(module) is not None}

    def _count(self, module: str) -> None:
        if module in self._counted:
            self._done += self._counted[module]
            if self._progress is not None:
                self._progress(module, self._done, sum(self._counted.values()))

    def _read_reports(self, part: Part) -> list[MatrixReport]:
        path = self._report_file(part)
        return [from_json(MatrixReport, value, str(path)) for value in json.loads(path.read_text(encoding="utf-8"))]

    def _shard(self, part: Part) -> Path:
        index, count = list(self.parts).index(part) + 1, len(self.parts)
        return self._work / f"model-{index:05}-of-{count:05}.safetensors"

    def _report_file(self, part: Part) -> Path:
        return self._shard(part).with_suffix(".json")


def quantizing_schemes(recipe: Recipe, config: ModelConfig) -> dict[str, Scheme | None]:
    """As `assign_schemes`; raises VL2Error too where every matrix is kept, for no reader takes such a checkpoint."""
    schemes = assign_schemes(recipe, config)
    if not any(schemes.values()):
        raise VL2Error(f"recipe `{recipe.name}` quantizes nothing: every matrix is kept",
                       "give some modules a scheme, or export the checkpoint as it is: vl2 export --scheme fp16")
    return schemes


def recipe_for(options: QuantizeOptions, config: ModelConfig) -> Recipe:
    """The recipe of the options for a model. Raises VL2Error as `builtin_recipe` and `read_recipe` do."""
    path = Path(options.recipe)
    if path.suffix != ".json":
        return replace(builtin_recipe(options.recipe, config, options.outer), target=options.target)
    if options.outer != OuterParts():
        raise VL2Error(
            f"{path} is a recipe file, which decides on vision, lm_head and embeddings itself",
            "leave those options out, or edit the file",
        )
    recipe = read_recipe(path)
    return replace(recipe, target=options.target or recipe.target)

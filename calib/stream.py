"""The decoder over a calibration set, layer by layer: statistics out, quantized weights in, their outputs onward.

    WORK/
      identity.json                        what the folder was begun with
      hidden_{l}.safetensors               float32 [tokens, H], what enters layer l (after the last: the final norm);
                                           only the newest is kept, and a run goes on from it
      layer_{l}.attention.safetensors      statistics, written before `quantize_layer(l, "attention", path)`
      layer_{l}.mlp.safetensors            statistics, written before `quantize_layer(l, "mlp", path)`
      counts_{l}.json                      tokens that the statistics of each expert saw, by modality
      head.safetensors                     statistics of lm_head's input, after the last layer
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from vl2.calib.calibration_set import check_source, embedding_entries, read_calibration_set, read_modality
from vl2.calib.coverage import write_counts
from vl2.calib.demands import check_memory, layer_work
from vl2.calib.experts import ExpertInputs, add_routed_output, expert_shapes, expert_statistics, route
from vl2.calib.layer import Replaced, Tokens, attention_sites, load_attention, load_dense, load_routed, observe
from vl2.calib.progress import Report, Work, silent
from vl2.calib.statistics import SiteSum, StatisticsOptions, modality_weights, token_weights
from vl2.calib.tensor_file import Shapes, read_slice, shapes_of, write_tensors
from vl2.calib.weights import Weights, load_part, open_weights
from vl2.config import LanguageConfig
from vl2.errors import VL2Error
from vl2.json_file import read_json, to_json
from vl2.model.checkpoint import all_finite
from vl2.model.norm import RMSNorm
from vl2.safetensors_file import TensorEntry, read_header

HEAD_NAME, _IDENTITY_NAME = "head.safetensors", "identity.json"
STAGES = ("attention", "mlp")
QuantizeLayer = Callable[[int, str, Path], Mapping[str, Tensor]]


@dataclass(frozen=True)
class StreamOptions:
    """statistics: how tokens count; keep_statistics: leave the layers' files in place, 0.8 GB for each layer of Tiny;
    max_ram_bytes: refuse to begin when more is needed (without what `quantize_layer` holds); report: progress."""

    statistics: StatisticsOptions = field(default_factory=StatisticsOptions)
    keep_statistics: bool = False
    max_ram_bytes: int | None = None
    report: Report = silent


@dataclass(frozen=True)
class StreamResult:
    """hidden: file of the states [tokens, H] that enter the final norm; head_statistics: of what enters lm_head."""

    hidden: Path
    head_statistics: Path


@dataclass(frozen=True)
class _Run:
    weights: Weights
    tokens: Tokens
    work_dir: Path
    quantize_layer: QuantizeLayer | None
    work: Work
    steps: Mapping[tuple[int, str], float]
    metadata: Mapping[str, object]

    @property
    def config(self) -> LanguageConfig:
        return self.weights.config.language_config

    def advance(self, l: int, step: str, share: float) -> None:
        self.work.advance(f"layer {l}: {step}", self.steps[l, step] * share)


@torch.no_grad()
def stream_layers(
    checkpoint: Path, calibration_set: Path, work_dir: Path, quantize_layer: QuantizeLayer | None,
    options: StreamOptions | None = None,
) -> StreamResult:
    """Runs every layer: writes its statistics, asks `quantize_layer` for tensors, goes on with what they give.

    quantize_layer(layer, stage, statistics_path) gives dequantized float tensors by the checkpoint's names; what it
    leaves out stays as in the checkpoint. Stage "attention" is for the first norm and the attention, "mlp" for the
    rest. Each tensor is looked up once, so a mapping may compute it on demand. Without `quantize_layer` the layers run
    as they are and write no statistics: enough to see which experts the tokens reach, in about a third of the time.
    After an interruption the layer that was not finished is run again, whole. Raises VL2Error when the calibration set
    is another checkpoint's, when `work_dir` was begun with something else, when `max_ram_bytes` is too little, and when
    an output is not finite.
    """
    options = options or StreamOptions()
    description, weights = read_calibration_set(calibration_set), open_weights(checkpoint)
    check_source(description, checkpoint)
    layers = weights.config.language_config.num_hidden_layers
    lengths = [sequence.tokens for sequence in description.sequences]
    check_memory(weights.config.language_config, lengths, options.max_ram_bytes)
    first = _begin(work_dir, {"calibration": to_json(description), "statistics": to_json(options.statistics),
                              "quantizes": quantize_layer is not None})
    modality = read_modality(calibration_set)
    a = token_weights(modality, options.statistics)
    tokens = Tokens(tuple(description.spans()), modality, a, options.statistics)
    run = _new_run(weights, tokens, (work_dir, quantize_layer), (first, options.report))
    entry = embedding_entries(calibration_set)["hidden"] if first == 0 else _hidden_entry(work_dir, first)
    for l in range(first, layers):
        _write_hidden(work_dir, l + 1, _run_layer(run, l, entry))
        entry = _hidden_entry(work_dir, l + 1)
        _tidy(work_dir, l, options)
    return StreamResult(entry.path, _write_head(run, entry))


def _new_run(
    weights: Weights, tokens: Tokens, place: tuple[Path, QuantizeLayer | None], resumed: tuple[int, Report]
) -> _Run:
    config, (first, report) = weights.config.language_config, resumed
    steps = {(l, step): amount for l in range(config.num_hidden_layers)
             for step, amount in layer_work(config, l, len(tokens)).items()
             if place[1] is not None or not step.endswith("statistics")}
    done = sum(amount for (l, _), amount in steps.items() if l < first)
    metadata = {**to_json(tokens.options), "modality_weights": modality_weights(tokens.modality, tokens.weight)}
    return _Run(weights, tokens, *place, Work(sum(steps.values()), report, done), steps, metadata)


def _run_layer(run: _Run, l: int, entry: TensorEntry) -> Tensor:
    """[tokens, H] out of layer l; entry: what enters it."""
    hidden = _run_attention(run, l, entry)
    if run.config.is_moe(l):
        _run_routed(run, l, hidden)
    else:
        _run_dense(run, l, hidden)
    if not all_finite(hidden):
        raise VL2Error(f"the output of decoder layer {l} is not finite", "a weight that was put in place of the "
                       "checkpoint's is NaN or infinite, or the activations exceed float32")
    return hidden


def _run_attention(run: _Run, l: int, entry: TensorEntry) -> Tensor:
    replaced = _quantize(run, (l, "attention"), lambda: _observe_attention(run, l, entry))
    part = load_attention(run.weights, l, replaced)
    hidden = torch.empty(len(run.tokens), run.config.hidden_size)
    for start, stop in run.tokens.spans:
        hidden[start:stop] = part(read_slice(entry, start, stop))
        run.advance(l, "attention output", (stop - start) / len(run.tokens))
    return hidden


def _observe_attention(run: _Run, l: int, entry: TensorEntry) -> None:
    part = load_attention(run.weights, l)
    linears = {site: part.self_attn.get_submodule(name) for site, name in attention_sites(run.config).items()}
    observed = observe(part, linears, run.tokens)
    for start, stop in run.tokens.spans:
        observed(read_slice(entry, start, stop), slice(start, stop))
        run.advance(l, "attention statistics", (stop - start) / len(run.tokens))
    statistics = observed.tensors()
    _write_statistics(run, (l, "attention"), shapes_of(statistics), statistics.items())


def _run_dense(run: _Run, l: int, hidden: Tensor) -> None:
    """Replaces `hidden`, the attention's output, by the layer's."""
    part = load_dense(run.weights, l, _quantize(run, (l, "mlp"), lambda: _observe_dense(run, l, hidden)))
    for rows in run.tokens.chunks():
        hidden[rows] = part(hidden[rows])
        run.advance(l, "dense output", len(hidden[rows]) / len(hidden))


def _observe_dense(run: _Run, l: int, hidden: Tensor) -> None:
    part = load_dense(run.weights, l)
    observed = observe(part, {"mlp.input": part.mlp.gate_proj, "mlp.down": part.mlp.down_proj}, run.tokens)
    for rows in run.tokens.chunks():
        observed(hidden[rows], rows)
        run.advance(l, "dense statistics", len(hidden[rows]) / len(hidden))
    statistics = observed.tensors()
    _write_statistics(run, (l, "mlp"), shapes_of(statistics), statistics.items())


def _run_routed(run: _Run, l: int, hidden: Tensor) -> None:
    """Replaces `hidden`, the attention's output, by the layer's."""
    replaced = _quantize(run, (l, "mlp"), lambda: _observe_routed(run, l, hidden))
    inputs = _expert_inputs(run, l, hidden, replaced)
    if run.quantize_layer is None:
        write_counts(run.work_dir, l, inputs.routes.counts(run.tokens.modality))
    share = 1 / run.config.n_routed_experts
    add_routed_output(run.weights, l, inputs, replaced, lambda: run.advance(l, "expert output", share))


def _expert_inputs(run: _Run, l: int, hidden: Tensor, replaced: Replaced | None = None) -> ExpertInputs:
    part = load_routed(run.weights, l, replaced)
    return ExpertInputs(hidden, part, route(part, hidden, run.config), run.tokens)


def _observe_routed(run: _Run, l: int, hidden: Tensor) -> None:
    inputs, share = _expert_inputs(run, l, hidden), 1 / run.config.n_routed_experts
    counts = inputs.routes.counts(run.tokens.modality)
    write_counts(run.work_dir, l, counts)
    first = {**_shared_statistics(run, inputs), "router.counts": counts}
    experts = expert_statistics(run.weights, l, inputs, lambda: run.advance(l, "expert statistics", share))
    shapes = {**shapes_of(first), **expert_shapes(inputs.routes, run.config)}
    _write_statistics(run, (l, "mlp"), shapes, chain(first.items(), experts))


def _shared_statistics(run: _Run, inputs: ExpertInputs) -> dict[str, Tensor]:
    """`mlp.input`, which the router and all experts share, and `shared.down` where there are shared experts."""
    total, shared = SiteSum.empty(run.config.hidden_size), inputs.part.mlp.shared_experts
    observed = observe(shared, {"shared.down": shared.down_proj}, run.tokens) if shared is not None else None
    for rows in run.tokens.chunks():
        x = inputs.part.post_attention_layernorm(inputs.hidden[rows])
        run.tokens.record(total, rows, x)
        if observed is not None:
            observed(x, rows)
    return total.tensors("mlp.input") | ({} if observed is None else observed.tensors())


def _write_statistics(run: _Run, key: tuple[int, str], shapes: Shapes, pieces: Iterable[tuple[str, Tensor]]) -> None:
    l, stage = key
    facts = {"layer": l, "stage": stage, **run.metadata}
    write_tensors(_statistics_path(run.work_dir, l, stage), shapes, pieces, {"vl2": json.dumps(facts)})


def _quantize(run: _Run, key: tuple[int, str], write_statistics: Callable[[], None]) -> Replaced:
    """What `quantize_layer` makes of a stage; called when nothing is in memory but the hidden states."""
    if run.quantize_layer is None:
        return {}
    l, stage = key
    write_statistics()
    replaced = run.quantize_layer(l, stage, _statistics_path(run.work_dir, l, stage))
    first = f"language.layers.{l}."
    of_attention = (f"{first}self_attn.", f"{first}input_layernorm.")
    expected = {source for name, sources in run.weights.sources.items() for source in sources
                if name.startswith(first) and name.startswith(of_attention) == (stage == "attention")}
    unknown = set(replaced) - expected
    assert not unknown, f"layer {l} has no tensor {sorted(unknown)[:3]} in the stage {stage}"
    return replaced


def _write_head(run: _Run, entry: TensorEntry) -> Path:
    """Statistics of what enters lm_head, site `lm_head.input`."""
    config = run.config
    norm = load_part(run.weights, lambda: RMSNorm(config.hidden_size, config.rms_norm_eps), "language.norm.")
    total = SiteSum.empty(config.hidden_size)
    for start, stop in run.tokens.spans:
        run.tokens.record(total, slice(start, stop), norm(read_slice(entry, start, stop)))
    path, tensors = run.work_dir / HEAD_NAME, total.tensors("lm_head.input")
    write_tensors(path, shapes_of(tensors), tensors.items(), {"vl2": json.dumps(dict(run.metadata))})
    return path


def _begin(work_dir: Path, identity: dict) -> int:
    """The layer to go on with: 0, or the one that the newest hidden states enter."""
    path = work_dir / _IDENTITY_NAME
    work_dir.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if any(work_dir.iterdir()):
            raise VL2Error(f"{work_dir} is not empty and was not begun here", "give a folder of its own")
        partial = work_dir / f"{_IDENTITY_NAME}.partial"
        partial.write_text(json.dumps(identity), encoding="utf-8")
        partial.replace(path)
        return 0
    if read_json(path) != identity:
        raise VL2Error(f"{work_dir} was begun with another calibration set or other options",
                       "remove the folder to begin anew, or go on with what it was begun with")
    return max((int(found.stem.removeprefix("hidden_")) for found in work_dir.glob("hidden_*.safetensors")), default=0)


def _statistics_path(work_dir: Path, l: int, stage: str) -> Path:
    return work_dir / f"layer_{l:03}.{stage}.safetensors"


def _hidden_path(work_dir: Path, l: int) -> Path:
    return work_dir / f"hidden_{l:03}.safetensors"


def _hidden_entry(work_dir: Path, l: int) -> TensorEntry:
    return read_header(_hidden_path(work_dir, l))["hidden"]


def _write_hidden(work_dir: Path, l: int, hidden: Tensor) -> None:
    write_tensors(_hidden_path(work_dir, l), shapes_of({"hidden": hidden}), [("hidden", hidden)])


def _tidy(work_dir: Path, l: int, options: StreamOptions) -> None:
    """Removes what no later layer reads."""
    _hidden_path(work_dir, l).unlink(missing_ok=True)
    if not options.keep_statistics:
        for stage in STAGES:
            _statistics_path(work_dir, l, stage).unlink(missing_ok=True)

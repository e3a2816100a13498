"""Both checkpoints over evaluation data: tower, embeddings, layer after layer, head; resumable step by step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vl2 import __version__
from vl2.calib.calibration_set import checkpoint_source
from vl2.calib.data import CalibrationData, CheckedSample
from vl2.calib.demands import layer_work, tile_work
from vl2.calib.progress import Report, Work, silent
from vl2.folder_lock import locked_folder
from vl2.json_file import to_json
from vl2.layerwise.checkpoints import Pair, open_pair
from vl2.layerwise.decoder import run_layer
from vl2.layerwise.demands import check_memory
from vl2.layerwise.embed import compare_tables, embed_both, positions_of
from vl2.layerwise.figures import to_report
from vl2.layerwise.head import logit_figures, logit_kinds, run_head
from vl2.layerwise.ledger import Ledger
from vl2.layerwise.parts import States
from vl2.layerwise.tower import TILES_AT_ONCE, tower_steps
from vl2.layerwise.work import WorkFolder
from vl2.prompt import Processor


@dataclass(frozen=True)
class MeasureOptions:
    """work: the folder to work in, None for a temporary one, and then an interrupted measurement cannot go on;
    max_ram_bytes: refuse to begin when more is needed."""

    work: Path | None = None
    max_ram_bytes: int | None = None
    report: Report = silent


@dataclass(frozen=True)
class _Run:
    pair: Pair
    data: CalibrationData
    folder: WorkFolder
    work: Work

    @property
    def layers(self) -> int:
        return self.pair.config.language_config.num_hidden_layers


@torch.no_grad()
def measure_layers(reference: Path, quantized: Path, data: CalibrationData, options: MeasureOptions | None = None
                   ) -> dict[str, Any]:
    """The layer report, as docs/formats.md describes it, JSON without NaN or infinity.

    data: of `read_data`, with the reference's processor. Raises VL2Error as `open_pair` and `check_memory`, and where
    the work folder is another job's or in use.
    """
    options, start = options or MeasureOptions(), time.monotonic()
    pair = open_pair(reference, quantized)
    check_memory(pair.config, [sample.tokens for sample in data.samples], options.max_ram_bytes)
    sources = [to_json(checkpoint_source(folder)) for folder in (reference, quantized)]
    with _place(options.work) as place:
        folder = WorkFolder(place, {"sources": sources, "data": data.sha256, "vl2_version": __version__})
        run = _Run(pair, data, folder, _work(pair, data, folder, options.report))
        ledger, states, following = _until_head(run)
        head = Ledger()
        distances = run_head(pair, states, following, (head, lambda share: run.work.advance(
            "lm_head", share * _head_work(pair, len(following)))))
        ledger += head
    kinds = logit_kinds(states.modality.numpy(), following.numpy())
    logits = logit_figures(distances, kinds, _clusters(data))
    return to_report(pair, (sources, data), ledger, logits, round(time.monotonic() - start, 1))


@contextmanager
def _place(work: Path | None) -> Iterator[Path]:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        with locked_folder(work, "measurement of layers"):
            yield work
        return
    with tempfile.TemporaryDirectory(prefix="vl2-layers-") as folder:
        yield Path(folder)


def _until_head(run: _Run) -> tuple[Ledger, States, torch.Tensor]:
    """The sum of all steps, what leaves the last layer, and what follows each position."""
    total, (states, following) = Ledger(), _embedded(run)
    for step in _image_steps(run.data):
        total += run.folder.ledger(step)
    spans = _spans(run.data)
    config = run.pair.config.language_config
    for l in range(run.layers):
        if not run.folder.has(f"layer_{l:03}"):
            ledger, work = Ledger(), layer_work(config, l, len(following))
            states = run_layer(run.pair, l, states, spans, (ledger, lambda step, share, l=l, work=work: (
                run.work.advance(f"layer {l}", work[step] * share))))
            run.folder.finish(f"layer_{l:03}", ledger, states, following)
            for step in _image_steps(run.data) if l == 0 else (f"layer_{l - 1:03}",):
                run.folder.forget_states(step)
        total += run.folder.ledger(f"layer_{l:03}")
    return total, states, following


def _embedded(run: _Run) -> tuple[States, torch.Tensor]:
    """The newest states there are; at first, those that enter layer 0."""
    for l in reversed(range(run.layers)):
        if run.folder.has(f"layer_{l:03}"):
            return run.folder.states(f"layer_{l:03}")
    # mask_prompt: targets are the answers' tokens, whatever the checkpoint was trained on
    processor = replace(Processor.from_folder(run.pair.reference.folder), mask_prompt=True)
    steps = _image_steps(run.data)
    for step, chunk in steps.items():
        if not run.folder.has(step):
            _embed_chunk(run, processor, step, chunk)
    parts = [run.folder.states(step) for step in steps]
    reference, modality = (torch.cat([getattr(states, name) for states, _ in parts])
                           for name in ("reference", "modality"))
    same = all(states.same for states, _ in parts)
    quantized = reference if same else torch.cat([states.quantized for states, _ in parts])
    return States(reference, quantized, modality), torch.cat([following for _, following in parts])


def _embed_chunk(run: _Run, processor: Processor, step: str, chunk: list[CheckedSample]) -> None:
    ledger = Ledger()
    prompts = [processor.encode(one.sample.opened(), inference=not one.sample.is_answered) for one in chunk]
    tiles = sum(len(prompt.tiles) for prompt in prompts)
    share = tiles * tile_work(run.pair.config.vision_config) / tower_steps(run.pair.config.vision_config)
    if step == next(iter(_image_steps(run.data))):
        compare_tables(run.pair, ledger)
    states = embed_both(run.pair, prompts, ledger, lambda: run.work.advance("images", share))
    run.folder.finish(step, ledger, states, positions_of(prompts, processor.ignore_id).following)


def _image_steps(data: CalibrationData) -> dict[str, list[CheckedSample]]:
    """Step → consecutive samples of at most so many tiles together, or one that alone has more."""
    chunks: list[list[CheckedSample]] = [[]]
    for sample in data.samples:
        if chunks[-1] and sum(one.tiles for one in chunks[-1]) + sample.tiles > TILES_AT_ONCE:
            chunks.append([])
        chunks[-1].append(sample)
    return {f"images_{index:05}": chunk for index, chunk in enumerate(chunks)}


def _work(pair: Pair, data: CalibrationData, folder: WorkFolder, report: Report) -> Work:
    """All work in operations of one of the runs, of which there are three of each part."""
    config, tokens = pair.config.language_config, sum(sample.tokens for sample in data.samples)
    steps = {step: sum(one.tiles for one in chunk) * tile_work(pair.config.vision_config)
             for step, chunk in _image_steps(data).items()}
    steps |= {f"layer_{l:03}": sum(amount for step, amount in layer_work(config, l, tokens).items()
                                   if step.endswith("output")) for l in range(config.num_hidden_layers)}
    done = sum(amount for step, amount in steps.items() if folder.has(step))
    return Work(sum(steps.values()) + _head_work(pair, tokens), report, done)


def _head_work(pair: Pair, tokens: int) -> float:
    return 2.0 * tokens * pair.config.language_config.vocab_size * pair.config.language_config.hidden_size


def _spans(data: CalibrationData) -> list[tuple[int, int]]:
    ends = list(accumulate(sample.tokens for sample in data.samples))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _clusters(data: CalibrationData) -> np.ndarray:
    """int [tokens]: equal for the positions of conversations on the same images."""
    names: dict[Any, int] = {}
    of_sample = [names.setdefault(one.image_sha256 or index, len(names)) for index, one in enumerate(data.samples)]
    return np.repeat(of_sample, [sample.tokens for sample in data.samples])

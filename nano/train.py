"""Trains vl2-nano from nothing: `python -m vl2.nano.train --out DIR`.

Stage 1 teaches the tower alone to tell glyphs, and beside it, where `decoder_steps` says so, the decoder alone on ideal
image tokens; stage 2 trains everything on question and answer pages, beside each batch of which goes a dense one for
the tower. A run that was ended resumes at its last state (DIR/state.pt); a finished
one leaves DIR/checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from vl2.nano.batches import (
    CROP_PLAN,
    DENSE_CROPS,
    EASY_MIX,
    FULL_MIX,
    TOWER_CROPS,
    TOWER_MIX,
    TRAINING_SEED,
    Batch,
    batch_stream,
)
from vl2.nano.checkpoint_files import read_state, training_values, write_checkpoint
from vl2.nano.decoder_stage import decoder_process, decoder_values
from vl2.nano.geometry import config_dict
from vl2.nano.helper import Exchange, run_helper
from vl2.nano.losses import Aims, Outcome, auxiliary_shapes, batch_loss
from vl2.nano.muon import Muon
from vl2.nano.network import Shape
from vl2.nano.parameters import FlatParameters, initial_values, parameter_shapes
from vl2.nano.training_log import Log

# glibc returns large blocks to the system by default; page faults then take seven eighths of the time.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456",
             "MALLOC_ARENA_MAX": "1"}


TIMED_STEPS = 100  # of joint training, from which `minutes` tells how many more there is time for
AVERAGING = 0.997  # of the weights over steps; the average is what is shipped


@dataclass(frozen=True)
class Plan:
    """What is trained and for how long; steps are batches (CROP_PLAN says how many pages each has, times batch_scale).

    One run took these values (`dense_every` 3 before step 2200), and the shipped weights are those of a second one that
    went on from it: the Makefile has the commands, docs/results.md what they reached.
    """

    variant: str = "mha"
    tower_steps: int = 690
    decoder_steps: int = 0
    easy_steps: int = 460
    steps: int = 4300
    decay_steps: int = 2100
    tower_rate: float = 1.4e-3
    joint_rate: float = 7e-4
    warmup_steps: int = 100
    tower_weight: float = 1.0
    dense_every: int = 2
    weight_decay: float = 0.02
    seed: int = 0
    batch_scale: int = 1

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up at the start of each stage, constant, linear decay to 2 % at the end."""
        tower = step < self.tower_steps
        since = step if tower else step - self.tower_steps
        warm = min(1.0, (since + 1) / self.warmup_steps)
        decay = min(1.0, max(0.02, (self.steps - step) / self.decay_steps))
        return (self.tower_rate if tower else self.joint_rate) * warm * decay

    def aims(self, step: int) -> Aims:
        """What step `step` is to learn: the tower alone, and ideal image tokens where a decoder learns on them."""
        tower = step < self.tower_steps
        return Aims(not tower, self.tower_weight, 1.0 if tower and self.decoder_steps else 0.0)


def schedule(plan: Plan, index: int) -> tuple[dict, dict]:
    """(kinds of documents, crops) of batch `index`: joint training begins with easy pages of one tile."""
    if index < plan.tower_steps:
        mix, crops = TOWER_MIX, TOWER_CROPS
    elif index < plan.tower_steps + plan.easy_steps:
        mix, crops = EASY_MIX, {(1, 1): CROP_PLAN[(1, 1)]}
    else:
        mix, crops = FULL_MIX, CROP_PLAN
    return mix, _scaled(crops, plan.batch_scale)


def dense_schedule(plan: Plan, index: int) -> tuple[dict, dict]:
    """As `schedule`, for the second batch of every joint step."""
    return TOWER_MIX, _scaled(DENSE_CROPS, plan.batch_scale)


def _scaled(crops: dict, scale: int) -> dict:
    return {crop: (share, pages * scale, room) for crop, (share, pages, room) in crops.items()}


class Pace:
    """Learns from the first joint steps how many there is time for; `began`: seconds that the run had before."""

    def __init__(self, minutes: float, first: int, began: float):
        self.first, self.timed, self.end = first, began, began + 60 * minutes if minutes else None

    def fitted(self, plan: Plan, step: int, seconds: float) -> Plan:
        """The plan, TIMED_STEPS behind `first` with the steps that fit; the rate falls over the second half of them."""
        if step == self.first:
            self.timed = seconds
        if self.end is None or step != self.first + TIMED_STEPS:
            return plan
        steps = max(1, int((self.end - seconds) * TIMED_STEPS / (seconds - self.timed)))
        return dataclasses.replace(plan, steps=step + steps, decay_steps=max(1, steps // 2))


class Trainer:
    """Parameters, optimizer and position of one run; everything needed to resume it."""

    def __init__(self, plan: Plan, out: Path, start: Path | None = None):
        self.plan, self.out, self.step, self.pages, self.seconds = plan, out, 0, 0, 0.0
        self.exchange: Exchange | None = None
        self.shape = Shape.from_config(config_dict(plan.variant))
        shapes = {**parameter_shapes(self.shape), **auxiliary_shapes(self.shape)}
        values = initial_values(shapes, plan.seed)
        run = start is not None and (start / "state.pt").is_file()
        if start is not None and not run:
            values |= training_values(start, shapes)
        self.parameters = FlatParameters(values)
        self.master = torch.nn.Parameter(self.parameters.master)
        self.average = self.parameters.master.clone()
        self.optimizer = Muon(self.master, self.parameters.sizes, plan.weight_decay)
        if run:
            self._go_on(start)

    def _go_on(self, run: Path) -> None:
        """From the averaged weights of another run, its training-only heads included; step and optimizer begin anew.

        What the other variant has under another name or in another shape, its attention, begins anew as well.
        """
        state, given = read_state(run)
        self.pages, self.seconds = state["pages"], state["seconds"]
        for name, value in self.parameters.named(self.master.data).items():
            if name in given and given[name].shape == value.shape:
                value.copy_(given[name])
        self.average.copy_(self.master.data)
        self.parameters.refresh()

    def adopt(self, values: dict[str, torch.Tensor]) -> None:
        """Takes over parameters that another process has trained, in the average as well."""
        for vector in (self.master.data, self.average):
            mine = self.parameters.named(vector)
            for name, value in values.items():
                mine[name].copy_(value)
        self.parameters.refresh()

    def save(self) -> None:
        """Writes DIR/state.pt beside and renames it into place."""
        state = {"plan": dataclasses.asdict(self.plan), "step": self.step, "pages": self.pages,
                 "seconds": self.seconds, "master": self.master.data.cpu(),
                 "average": self.average.cpu(), "optimizer": self.optimizer.state_dict()}
        partial = self.out / "state.partial"
        torch.save(state, partial)
        os.replace(partial, self.out / "state.pt")

    def resume(self) -> None:
        state = torch.load(self.out / "state.pt", weights_only=True, map_location="cpu")
        self.step, self.pages, self.seconds = state["step"], state["pages"], state["seconds"]
        self.master.data.copy_(state["master"])
        self.average.copy_(state.get("average", state["master"]))
        self.optimizer.load_state_dict(state["optimizer"])
        self.parameters.refresh()

    def update(self, batch: Batch, dense: Batch | None = None) -> Outcome:
        """One optimizer step; `dense` is a second batch of which only the tower's loss counts. Returns the first's."""
        plan, flat = self.plan, self.parameters
        flat.grad.zero_()
        outcome = batch_loss(flat.weights, self.shape, batch, plan.aims(self.step))
        outcome.loss.backward()
        if dense is not None:
            second = batch_loss(flat.weights, self.shape, dense, Aims(language=False))
            (second.loss * plan.tower_weight).backward()
            outcome.parts |= {f"dense_{name}": second.parts[name] for name in ("patches", "slots")}
        self.master.grad = self._with_help(flat.grad.float())
        outcome.parts["gradient"] = torch.nn.utils.clip_grad_norm_([self.master], 1.0).item()
        self.optimizer.step(plan.rate(self.step))
        flat.refresh()
        self.average.lerp_(self.master.data, 1 - AVERAGING)
        self.step += 1
        self.pages += len(batch.tiles) + (0 if dense is None else len(dense.tiles))
        return outcome

    def start_helper(self) -> None:
        """Starts the process that adds gradients of its own batches."""
        self.exchange = Exchange.around(self.parameters.working, self.step)
        arguments = (self.exchange, self.plan, schedule, self.shape, dict(self.parameters.sizes))
        multiprocessing.get_context("spawn").Process(target=run_helper, args=arguments, daemon=True).start()

    def _with_help(self, gradient: torch.Tensor) -> torch.Tensor:
        exchange = self.exchange
        if exchange is None:
            return gradient
        exchange.step.fill_(self.step)
        if exchange.ready:
            gradient = (gradient + exchange.gradient.float()) / 2
            self.pages += int(exchange.pages)
            exchange.pages.zero_()
            exchange.ready.zero_()
        return gradient


@dataclass(frozen=True)
class Resources:
    """workers: rendering processes; helper: a second process adds gradients; start: run or checkpoint to go on from.

    minutes: of this process, which set the plan's steps (0: as planned).
    """

    workers: int = 1
    helper: bool = False
    start: Path | None = None
    minutes: float = 0.0


def train(plan: Plan, out: Path, resources: Resources = Resources()) -> Trainer:
    """Runs or resumes `plan` in the folder `out`; returns the finished trainer."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    trainer, log = Trainer(plan, out, resources.start), Log(out / "log.jsonl")
    if (out / "state.pt").exists():
        trainer.resume()
    if resources.helper:
        trainer.start_helper()
    pages_of = f"{TRAINING_SEED}-{plan.seed}"
    batches = batch_stream(pages_of, functools.partial(schedule, plan), trainer.step, resources.workers)
    dense = batch_stream(pages_of + "-dense", functools.partial(dense_schedule, plan), trainer.step,
                         max(1, resources.workers // 3))
    pace = Pace(resources.minutes, max(plan.tower_steps, trainer.step), trainer.seconds)
    last_save = last = time.monotonic()
    since, pages = last, trainer.pages
    decoder = decoder_process(plan, out) if plan.decoder_steps and trainer.step <= plan.tower_steps else None
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    while trainer.step < plan.steps and not ended:
        if decoder is not None and trainer.step == plan.tower_steps:
            decoder.join(1.0)
            if decoder.is_alive():
                continue
            trainer.adopt(decoder_values(out, decoder.exitcode))
            decoder = None
        batch = next(batches)
        second = next(dense) if trainer.step >= plan.tower_steps and trainer.step % plan.dense_every == 0 else None
        log.add(trainer.update(batch, second), batch.crop)
        now = time.monotonic()
        trainer.seconds += now - last
        last = now
        plan = trainer.plan = pace.fitted(plan, trainer.step, trainer.seconds)
        if trainer.step % 50 == 0:
            log.write(trainer, (trainer.pages - pages) / (now - since))
            since, pages = now, trainer.pages
        if now - last_save > 120 or ended or trainer.step in (plan.steps, plan.tower_steps):
            trainer.save()
            last_save = now
    if decoder is not None:
        decoder.terminate()
    return trainer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vl2.nano.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for state, log and the final checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that render pages")
    parser.add_argument("--start", type=Path, help="a run to go on from, its heads included, or a checkpoint")
    parser.add_argument("--helper", action="store_true", help="a second process adds gradients (on a CPU)")
    parser.add_argument("--minutes", type=float, default=0.0, help="sets --steps by what there is time for")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    for field in dataclasses.fields(Plan):
        kind = type(field.default)
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default)
    options = vars(parser.parse_args(arguments))
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, "-m", "vl2.nano.train", *sys.argv[1:]], {**os.environ, **ALLOCATOR})
    out, threads = options.pop("out"), options.pop("threads")
    torch.set_default_device(options.pop("device"))
    resources = Resources(**{field.name: options.pop(field.name) for field in dataclasses.fields(Resources)})
    torch.set_num_threads(threads)
    train(Plan(**options), out, resources)
    print(f"{out / 'checkpoint'}: {write_checkpoint(out, out / 'checkpoint'):,} bytes of weights")


if __name__ == "__main__":
    main()

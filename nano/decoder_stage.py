"""The decoder alone on ideal image tokens, in a process of its own while the tower learns: writes DIR/decoder.pt.

No tower runs, so that a step takes a third of a joint one's time, and glyphs are given without fault from the first
step on: what is learnt is where to look.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from vl2.nano.batches import CROP_PLAN, FULL_MIX, TRAINING_SEED, batch_stream
from vl2.nano.geometry import config_dict
from vl2.nano.losses import auxiliary_shapes, decoder_loss
from vl2.nano.muon import Muon
from vl2.nano.network import Shape
from vl2.nano.parameters import FlatParameters, initial_values, parameter_shapes
from vl2.nano.training_log import Log

MIX = {kind: share for kind, share in FULL_MIX.items() if kind != "dense"}
CROPS = {crop: (share, *CROP_PLAN[crop][1:]) for crop, share in (((1, 1), 0.7), ((2, 1), 0.15), ((1, 2), 0.15))}
WARM_UP_STEPS = 100
SAVE_SECONDS = 120.0
RESULT, STATE = "decoder.pt", "decoder_state.pt"


def is_trained_here(name: str) -> bool:
    """Whether the stage trains a parameter: not those of tower and projector, nor the tower's heads."""
    return not name.startswith(("vision.", "projector.", "auxiliary.")) or name.startswith("auxiliary.places.")


def schedule(index: int) -> tuple[dict, dict]:
    """As `train.schedule`."""
    return MIX, CROPS


class DecoderStage:
    """Parameters, optimizer and position of the stage; plan: `train.Plan`."""

    def __init__(self, plan, out: Path):
        self.plan, self.out, self.step, self.pages, self.seconds = plan, out, 0, 0, 0.0
        self.shape = Shape.from_config(config_dict(plan.variant))
        values = initial_values({**parameter_shapes(self.shape), **auxiliary_shapes(self.shape)}, plan.seed)
        self.parameters = FlatParameters({name: value for name, value in values.items() if is_trained_here(name)})
        self.master = torch.nn.Parameter(self.parameters.master)
        self.optimizer = Muon(self.master, self.parameters.sizes, plan.weight_decay)
        if (out / STATE).exists():
            self._resume()

    def rate(self) -> float:
        """Learning rate: linear warm-up, constant, over the last third a linear decay to a half."""
        plan = self.plan
        left = (plan.decoder_steps - self.step) / (plan.decoder_steps / 3)
        return plan.joint_rate * min(1.0, (self.step + 1) / WARM_UP_STEPS) * min(1.0, 0.5 + 0.5 * left)

    def update(self, batch):
        """One optimizer step; returns the batch's Outcome."""
        flat = self.parameters
        flat.grad.zero_()
        outcome = decoder_loss(flat.weights, self.shape, batch)
        outcome.loss.backward()
        self.master.grad = flat.grad.float()
        torch.nn.utils.clip_grad_norm_([self.master], 1.0)
        self.optimizer.step(self.rate())
        flat.refresh()
        self.step += 1
        self.pages += len(batch.tiles)
        return outcome

    def save(self) -> None:
        """Beside and renamed into place."""
        state = {"step": self.step, "pages": self.pages, "seconds": self.seconds, "master": self.master.data,
                 "optimizer": self.optimizer.state_dict()}
        _write(state, self.out / STATE)

    def _resume(self) -> None:
        state = torch.load(self.out / STATE, weights_only=True)
        self.step, self.pages, self.seconds = state["step"], state["pages"], state["seconds"]
        self.master.data.copy_(state["master"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.parameters.refresh()


def _write(content: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def run_decoder(plan, out: Path) -> None:
    """The stage's process: runs or resumes it and writes the result; ends with its parent."""
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    stage, log, parent = DecoderStage(plan, out), Log(out / "decoder.jsonl"), os.getppid()
    batches = batch_stream(f"{TRAINING_SEED}-{plan.seed}-decoder", schedule, stage.step)
    last = saved = shown = time.monotonic()
    pages = stage.pages
    while stage.step < plan.decoder_steps and os.getppid() == parent:
        batch = next(batches)
        log.add(stage.update(batch), batch.crop)
        now = time.monotonic()
        stage.seconds, last = stage.seconds + now - last, now
        if stage.step % 50 == 0:
            log.write(stage, (stage.pages - pages) / (now - shown))
            shown, pages = now, stage.pages
        if now - saved > SAVE_SECONDS:
            stage.save()
            saved = now
    if stage.step == plan.decoder_steps:
        _write(stage.parameters.named(stage.master.data), out / RESULT)


def decoder_process(plan, out: Path) -> multiprocessing.Process:
    """The stage's process, started; it ends at once where the result is there already."""
    process = multiprocessing.get_context("spawn").Process(target=_run_where_needed, args=(plan, out))
    process.start()
    return process


def _run_where_needed(plan, out: Path) -> None:
    if not (out / RESULT).exists():
        run_decoder(plan, out)


def decoder_values(out: Path, exitcode: int | None = None) -> dict[str, Tensor]:
    """What the stage has trained, by name, float32. Raises RuntimeError where it ended without a result."""
    if not (out / RESULT).exists():
        raise RuntimeError(f"the process that trains the decoder ended with {exitcode} and left no {RESULT}")
    return torch.load(out / RESULT, weights_only=True)

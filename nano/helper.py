"""A second process that contributes gradients: on a shared machine it soaks up whatever the other core has left.

It computes gradients of its own batches on a copy of the weights and hands them over through shared memory. The
trainer averages them into its next step without waiting, so they are about one step old.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from vl2.nano.batches import TRAINING_SEED, load_processor, make_batch
from vl2.nano.losses import batch_loss
from vl2.nano.network import Shape
from vl2.nano.parameters import FlatParameters


@dataclass
class Exchange:
    """Shared memory: the trainer writes `weights` and `step`; the helper fills `gradient`, then sets `ready`.

    weights, gradient: bfloat16 [P]; step, ready, pages: int64 [1]; pages counts those the helper has used.
    """

    weights: Tensor
    gradient: Tensor
    step: Tensor
    ready: Tensor
    pages: Tensor

    @classmethod
    def around(cls, weights: Tensor, step: int) -> Exchange:
        counters = [torch.tensor([value]).share_memory_() for value in (step, 0, 0)]
        return cls(weights, torch.zeros_like(weights).share_memory_(), *counters)


def run_helper(exchange: Exchange, plan, schedule, shape: Shape, sizes: dict[str, tuple[int, ...]]) -> None:
    """The helper process's main loop; ends with the trainer."""
    os.setsid()  # its own scheduling group, so that it yields to other work while the trainer does not
    torch.set_num_threads(1)
    processor, parent = load_processor(), os.getppid()
    own = FlatParameters({name: torch.zeros(size) for name, size in sizes.items()})
    for index in itertools.count(int(exchange.step)):
        step = int(exchange.step)
        batch = make_batch(processor, TRAINING_SEED + "-helper", index, *schedule(plan, step))
        with torch.no_grad():
            own.working.copy_(exchange.weights)
        own.grad.zero_()
        batch_loss(own.weights, shape, batch, plan.aims(step)).loss.backward()
        while exchange.ready and os.getppid() == parent:
            time.sleep(0.01)
        if os.getppid() != parent:
            return
        exchange.gradient.copy_(own.grad)
        exchange.pages += len(batch.tiles)
        exchange.ready.fill_(1)

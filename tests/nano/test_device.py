"""Training on another device than the host: every tensor that a step makes is there, shown without such a device."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vl2.nano import ideal
from vl2.nano.batches import load_processor, make_batch
from vl2.nano.train import TIMED_STEPS, Pace, Plan, Trainer, dense_schedule, schedule

AWAY = "cuda"


class Pretended(TorchDispatchMode):
    """Follows which tensors are away: as a device would, an operation refuses tensors of both places.

    Scalars may be mixed, and copies go from one place to the other, as on a real device.
    """

    def __init__(self):
        super().__init__()
        self.away: dict[int, StorageWeakRef] = {}

    def is_away(self, tensor: torch.Tensor) -> bool:
        found = self.away.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        self.away[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage())
        return tensor

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        copies = operation is torch.ops.aten.copy_.default
        mixed = len({self.is_away(tensor) for tensor in tensors if tensor.dim()}) > 1
        assert copies or not mixed, f"{operation} mixes devices: {[tuple(tensor.shape) for tensor in tensors]}"
        here = self.is_away(args[0]) if copies else any(map(self.is_away, tensors))
        out = operation(*args, **(kwargs or {}))
        if here:
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.send(leaf)
        return out


class Default(TorchFunctionMode):
    """What `torch.set_default_device` does, upon `Pretended`."""

    def __init__(self, devices: Pretended):
        super().__init__()
        self.devices = devices

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        away = function in _device_constructors() and "device" not in kwargs and function is not torch.from_numpy
        if function is torch.Tensor.to and AWAY in args:
            return self.devices.send(args[0].clone())
        if function is torch.Tensor.cpu:
            return torch.empty(args[0].shape, dtype=args[0].dtype, device="cpu")
        out = function(*args, **kwargs)
        return self.devices.send(out) if away else out


@pytest.fixture
def devices(monkeypatch) -> Iterator[Pretended]:
    monkeypatch.setattr(torch, "get_default_device", lambda: AWAY)
    ideal._vectors.cache_clear()
    devices = Pretended()
    with devices, Default(devices):
        yield devices
    ideal._vectors.cache_clear()


def test_a_mixture_of_devices_is_seen(devices) -> None:
    there = torch.ones(3)
    assert devices.is_away(there + 1) and not devices.is_away(torch.ones(3, device="cpu"))
    with pytest.raises(AssertionError, match="mixes devices"):
        there + torch.ones(3, device="cpu")


@pytest.mark.parametrize("variant", ["mha", "mla"])
def test_every_tensor_of_a_training_step_is_on_the_chosen_device(tmp_path: Path, devices, variant: str) -> None:
    processor, plan = load_processor(), Plan(variant=variant, tower_steps=1, easy_steps=0, decoder_steps=1)
    crops = {crop: (1.0, 2, 60) for crop in ((1, 1),)}
    batches = [make_batch(processor, "device", index, schedule(plan, index)[0], crops) for index in range(3)]
    trainer = Trainer(plan, tmp_path)
    assert devices.is_away(trainer.parameters.working) and devices.is_away(trainer.optimizer.velocity)
    trainer.update(batches[0])
    trainer.update(batches[1], batches[2])
    assert trainer.step == 2


def test_batches_grow_with_their_scale() -> None:
    whole, scaled = schedule(Plan(), 5000)[1], schedule(Plan(batch_scale=4), 5000)[1]
    assert all(scaled[crop] == (share, 4 * pages, room) for crop, (share, pages, room) in whole.items())
    assert set(scaled) == set(whole)
    dense = dense_schedule(Plan(batch_scale=3), 0)[1], dense_schedule(Plan(), 0)[1]
    assert dense[0][(1, 1)][1] == 3 * dense[1][(1, 1)][1]


def test_a_run_of_so_many_minutes_plans_the_steps_that_fit() -> None:
    pace, plan = Pace(10, first=200, began=40), Plan()
    for step in range(200 + TIMED_STEPS):
        assert pace.fitted(plan, step, 40 + step) is plan
    # Half a second a step since step 200, 340 of 600 seconds left.
    found = pace.fitted(plan, 200 + TIMED_STEPS, 240 + TIMED_STEPS / 2 + 10)
    assert (found.steps, found.decay_steps) == (200 + TIMED_STEPS + 566, 283)
    assert Pace(0, 200, 0).fitted(plan, 200 + TIMED_STEPS, 999) is plan

"""Runs that go on: from their own last state, from another run, from a checkpoint."""

from pathlib import Path

import torch

from vl2.nano.checkpoint_files import write_checkpoint
from vl2.nano.train import Plan, Trainer


def trained(folder: Path) -> Trainer:
    """A trainer with some weights and optimizer state, saved in `folder`."""
    folder.mkdir()
    trainer = Trainer(Plan(), folder)
    trainer.master.grad = torch.randn(trainer.master.shape, generator=torch.Generator().manual_seed(1))
    trainer.optimizer.step(1e-3)
    trainer.average.lerp_(trainer.master.data, 0.5)
    trainer.step, trainer.pages, trainer.seconds = 7, 100, 60.0
    trainer.save()
    return trainer


def test_a_run_goes_on_at_its_state_and_another_one_from_its_weights(tmp_path: Path) -> None:
    first = trained(tmp_path / "first")
    again = Trainer(Plan(), tmp_path / "first")
    again.resume()
    assert again.step == 7 and torch.equal(again.optimizer.velocity, first.optimizer.velocity)
    second = Trainer(Plan(seed=1), tmp_path / "second", tmp_path / "first")
    assert (second.step, second.pages, second.seconds) == (0, 100, 60.0)
    assert not second.optimizer.velocity.any(), "a stage without the decoder's gradients must not move it"
    assert torch.equal(again.master.data, first.master.data) and torch.equal(again.average, first.average)
    assert torch.equal(second.master.data, first.average) and torch.equal(second.average, first.average)
    for run in (again, second):
        assert torch.equal(run.parameters.working, run.master.data.bfloat16())


def test_the_other_variant_goes_on_with_all_that_both_have(tmp_path: Path) -> None:
    first = trained(tmp_path / "first")
    second = Trainer(Plan(variant="mla"), tmp_path / "second", tmp_path / "first")
    given, taken = first.parameters.named(first.average), second.parameters.named(second.master.data)
    fresh = Trainer(Plan(variant="mla"), tmp_path / "third")
    begun = fresh.parameters.named(fresh.master.data)
    anew = [name for name, value in taken.items() if name not in given or given[name].shape != value.shape]
    assert {name.split("self_attn.")[1] for name in anew} == {
        "q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight"}
    for name, value in taken.items():
        assert torch.equal(value, begun[name] if name in anew else given[name]), name


def test_a_run_from_a_checkpoint_has_its_weights(tmp_path: Path) -> None:
    first = trained(tmp_path / "first")
    write_checkpoint(tmp_path / "first", tmp_path / "checkpoint")
    second = Trainer(Plan(), tmp_path / "second", tmp_path / "checkpoint")
    same = second.master.data.bfloat16() == first.average.bfloat16()
    heads = sum(torch.Size(size).numel() for name, size in second.parameters.sizes.items() if "auxiliary" in name)
    assert heads < len(same) and (~same).sum() <= heads

"""The decoder's own stage: ideal image tokens, what it trains, how it goes on and hands over."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vl2.nano import decoder_stage
from vl2.nano.batches import Batch, load_processor, make_batch
from vl2.nano.decoder_stage import MIX, RESULT, DecoderStage, decoder_values, is_trained_here, run_decoder
from vl2.nano.ideal import ideal_distance, ideal_tokens, ideal_views
from vl2.nano.labels import BLANK, SLOTS
from vl2.nano.losses import Aims, batch_loss
from vl2.nano.train import Plan, Trainer

HIDDEN = 128


@pytest.fixture(scope="module")
def batches() -> dict[tuple[int, int], Batch]:
    processor = load_processor()
    return {crop: make_batch(processor, "decoder", 0, MIX, {crop: (1.0, 2, 60)}) for crop in ((1, 1), (2, 1))}


@pytest.fixture
def stage_without_renderers(batches, monkeypatch) -> None:
    def stream(*_):
        while True:
            yield batches[1, 1]

    monkeypatch.setattr(decoder_stage, "batch_stream", stream)


def test_tokens_are_told_apart_by_their_glyphs_their_order_and_their_word_s_box() -> None:
    slots = np.array([[5, 6, 0], [6, 5, 0], [5, 0, 0], [5, 6, 0], [0, 0, 0]], np.uint8)
    boxes = np.full((5, 4), np.nan, np.float16)
    boxes[3] = (0.1, -0.2, 0.5, 0.2)
    tokens = ideal_tokens(slots, boxes, HIDDEN)
    assert tokens.isfinite().all()
    apart = (tokens[:, None] - tokens[None]).norm(dim=-1)
    # Two random vectors of their deviation are 9.6 apart.
    assert (apart + torch.eye(5) * 9 > 4).all()
    assert torch.equal(tokens, ideal_tokens(slots, boxes, HIDDEN))


@pytest.mark.parametrize("crop", [(1, 1), (2, 1)])
def test_views_have_the_tokens_of_their_cells(batches, crop) -> None:
    batch = batches[crop]
    view, local = ideal_views(batch, HIDDEN)
    assert local.shape == (2, crop[1], crop[0], *view.shape[1:])
    page, tile, cell = np.argwhere(batch.slots[..., 0] != BLANK)[-1]
    side = view.shape[1]
    there = local[page, tile // crop[0], tile % crop[0], cell // side, cell % side]
    expected = ideal_tokens(batch.slots[page, tile, cell], batch.boxes[page, tile, cell], HIDDEN)
    assert torch.allclose(there, expected, atol=1e-5)  # another order of summation
    if crop == (1, 1):
        assert torch.equal(view, local[:, 0, 0])
    assert batch.slots.shape[-1] == SLOTS


def test_the_tower_s_distance_is_none_from_ideal_tokens_and_counts_where_it_is_asked_for(batches) -> None:
    batch = batches[2, 1]
    ideal = ideal_tokens(batch.slots, batch.boxes, HIDDEN)
    assert ideal_distance(ideal, batch) == 0
    assert ideal_distance(ideal + 2, batch) == pytest.approx(4)
    trainer = Trainer(Plan(decoder_steps=1), Path())
    assert trainer.plan.aims(0) == Aims(False, ideal=1.0) and trainer.plan.aims(10**6) == Aims(True)
    weights = trainer.parameters.weights
    with torch.no_grad():
        without, with_it = (batch_loss(weights, trainer.shape, batch, Aims(False, ideal=weight)) for weight in (0, 2))
    assert with_it.loss - without.loss == pytest.approx(2 * with_it.parts["ideal"], rel=1e-3)


def test_the_stage_moves_the_decoder_and_its_embeddings_only(tmp_path, batches) -> None:
    stage = DecoderStage(Plan(decoder_steps=9), tmp_path)
    before = {name: value.clone() for name, value in stage.parameters.named(stage.master.data).items()}
    for batch in batches.values():
        stage.update(batch)
    after = stage.parameters.named(stage.master.data)
    whole = Trainer(Plan(), tmp_path).parameters.sizes
    assert set(after) == {name for name in whole if is_trained_here(name)}
    assert not any(name.startswith(("vision.", "projector.")) for name in after)
    still = [name for name, value in after.items() if torch.equal(value, before[name])]
    assert not still, "every parameter of the stage is in use"


@pytest.mark.usefixtures("stage_without_renderers")
def test_a_stage_that_was_ended_goes_on_and_its_trainer_takes_the_result_over(tmp_path, batches) -> None:
    with pytest.raises(RuntimeError, match="decoder.pt"):
        decoder_values(tmp_path, 1)
    plan = Plan(decoder_steps=2)
    first = DecoderStage(plan, tmp_path)
    first.update(batches[1, 1])
    first.save()
    again = DecoderStage(plan, tmp_path)
    assert again.step == 1 and torch.equal(again.master.data, first.master.data)
    run_decoder(plan, tmp_path)
    assert (tmp_path / RESULT).exists()
    values, trainer = decoder_values(tmp_path), Trainer(plan, tmp_path)
    trainer.adopt(values)
    for vector in (trainer.master.data, trainer.average):
        named = trainer.parameters.named(vector)
        assert all(torch.equal(named[name], value) for name, value in values.items())
    assert torch.equal(trainer.parameters.working, trainer.master.data.bfloat16())

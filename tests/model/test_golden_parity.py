"""The reference against the recorded outputs of the original implementation, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from tests.model.recorded import (
    CASES,
    GENERATED_CASES,
    Mini,
    Pair,
    cache_pairs,
    case_inputs,
    embedding_pairs,
    layer_pairs,
    logits_pairs,
    router_choices,
    router_pairs,
    traced_case,
    vision_pairs,
)
from tests.tolerances import HALF_PRECISION_COSINE, LOGITS, assert_close
from vl2.model.checkpoint import load_model
from vl2.model.decoder import positions_from_mask
from vl2.model.generate import GreedyOptions, generate_greedy, prefill

each_case = pytest.mark.parametrize("case", CASES)


def check(pairs: Iterable[Pair]) -> None:
    pairs = list(pairs)
    assert pairs
    for pair in pairs:
        assert_close(pair.got, pair.want, pair.bound, f"{pair.stage} {pair.what}")


def test_vision_tower_and_projector_give_the_recorded_features(mini: Mini) -> None:
    check(vision_pairs(mini))


@each_case
def test_merging_gives_the_recorded_embeddings(mini: Mini, case: str) -> None:
    check(embedding_pairs(mini, case))


@each_case
def test_every_layer_gives_the_recorded_attention_mlp_and_hidden_states(mini: Mini, case: str) -> None:
    check(layer_pairs(mini, case))


@each_case
def test_the_router_chooses_the_recorded_experts_for_every_real_token(mini: Mini, case: str) -> None:
    layers = list(router_choices(mini, case))
    assert [l for l, _, _ in layers] == [1, 2, 3]
    for l, got, want in layers:
        assert len(got) and np.array_equal(got, want), f"layer {l}"


@each_case
def test_the_router_gives_the_recorded_weights(mini: Mini, case: str) -> None:
    check(router_pairs(mini, case))


@each_case
def test_logits_are_the_recorded_ones(mini: Mini, case: str) -> None:
    check(logits_pairs(mini, case))
    real = case_inputs(mini, case)[1].numpy()
    argmax = traced_case(mini.folder, case).logits.argmax(-1).numpy()
    clear = real & (mini.golden[f"{case}/logits_top2_gap"] > 2 * LOGITS.atol)
    assert clear.sum() > 0.98 * real.sum()
    assert np.array_equal(argmax[clear], mini.golden[f"{case}/logits_argmax"][clear])


@each_case
def test_the_cache_holds_the_recorded_entries(mini: Mini, case: str) -> None:
    check(cache_pairs(mini, case))


@pytest.mark.parametrize("case", GENERATED_CASES)
def test_greedy_generation_gives_the_recorded_24_tokens(mini: Mini, case: str) -> None:
    generated = generate_greedy(mini.model, *case_inputs(mini, case), GreedyOptions())
    assert np.array_equal(generated.ids.numpy(), mini.generation[f"{case}/ids"])
    assert_close(generated.logits, mini.generation[f"{case}/step_logits"], LOGITS)


@pytest.mark.parametrize("counted", ("new_only", "with_prompt"))
@pytest.mark.parametrize("case", ("one", "text", "tiled"))
def test_the_repetition_penalty_gives_the_recorded_tokens(mini: Mini, case: str, counted: str) -> None:
    prompt = torch.from_numpy(mini.golden[f"{case}/input_ids"]).long() if counted == "with_prompt" else None
    options = GreedyOptions(repetition_penalty=1.1, penalised_ids=prompt)
    generated = generate_greedy(mini.model, *case_inputs(mini, case), options)
    assert np.array_equal(generated.ids.numpy(), mini.generation[f"{case}/reppen_{counted}_ids"])


@pytest.mark.parametrize("case", ("one", "text", "tiled"))
def test_chunked_prefill_gives_the_recorded_first_logits(mini: Mini, case: str) -> None:
    with torch.inference_mode():
        logits, _ = prefill(mini.model, *case_inputs(mini, case), int(mini.generation[f"{case}/chunk_size"]))
    assert_close(logits, mini.generation[f"{case}/chunked_first_logits"], LOGITS)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("case", ("one", "text"))
def test_a_run_in_half_precision_stays_near_the_recorded_logits(mini: Mini, case: str, dtype: torch.dtype) -> None:
    embeds, mask = case_inputs(mini, case)
    with torch.inference_mode():
        logits, cache = load_model(mini.folder, dtype)(embeds.to(dtype), positions_from_mask(mask), mask)
    assert logits.dtype == torch.float32 and all(entry.dtype == dtype for entry in cache)
    got, want = logits[:, -8:].numpy().ravel(), mini.golden[f"{case}/logits_last"].ravel()
    assert got @ want / (np.linalg.norm(got) * np.linalg.norm(want)) > HALF_PRECISION_COSINE

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tolerances import PENALISED_LOGIT
from vl2.errors import VL2Error
from vl2.runtime import GenerationOptions
from vl2.runtime.sampling import Sampler, nucleus, penalise_repetition

GOLDENS = Path(__file__).parents[1] / "goldens"
NONE = np.array([], np.int64)


def draws(options: GenerationOptions, logits: np.ndarray, count: int) -> np.ndarray:
    sampler = Sampler(options, NONE, len(logits))
    return np.array([sampler.draw(logits.copy()) for _ in range(count)])


def test_zero_temperature_takes_the_largest() -> None:
    assert draws(GenerationOptions(), np.array([0, 3, 1], np.float32), 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-46, 5e-324])
def test_a_temperature_that_float32_does_not_hold_is_greedy(temperature: float) -> None:
    logits = np.array([0, 3, -2e38, 1], np.float32)
    assert draws(GenerationOptions(temperature=temperature, seed=1), logits, 3).tolist() == [1, 1, 1]


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)
    first, again, other = (draws(GenerationOptions(temperature=1.0, seed=seed), logits, 50) for seed in (3, 3, 4))
    assert (first == again).all() and (first != other).any()


def test_without_a_seed_every_answer_differs() -> None:
    logits = np.zeros(1000, np.float32)
    assert (draws(GenerationOptions(temperature=1.0), logits, 20)
            != draws(GenerationOptions(temperature=1.0), logits, 20)).any()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (0.7, 0.9)])
def test_draws_follow_the_tempered_distribution_within_the_nucleus(temperature: float, top_p: float) -> None:
    logits = np.array([2.0, 1.0, 0.5, 0.0, -3.0], np.float32)
    expected = np.exp(logits.astype(float) / temperature)
    expected /= expected.sum()
    if top_p < 1:
        before = np.cumsum(expected) - expected
        expected = np.where(before < top_p, expected, 0)
        expected /= expected.sum()
    drawn = draws(GenerationOptions(temperature=temperature, top_p=top_p, seed=1), logits, 5000)
    found = np.bincount(drawn, minlength=5) / 5000
    # Four standard deviations of a share of 5,000 draws.
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / 5000 ** 0.5)


@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=60).filter(lambda p: sum(p) > 0.01),
       st.floats(0.01, 0.999))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(shares: list[float], top_p: float) -> None:
    probabilities = np.array(shares) / sum(shares)
    ids, found = nucleus(probabilities, top_p)
    assert found.sum() >= top_p - 1e-9 and found.sum() - found[-1] < top_p + 1e-9
    outside = np.delete(probabilities, ids)
    assert not len(outside) or outside.max() <= found.min()
    assert (np.diff(found) <= 0).all() and (probabilities[ids] == found).all()


def test_a_tiny_temperature_is_greedy_and_not_a_division_by_zero() -> None:
    logits = np.array([1.0, 5.0, 4.99], np.float32)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert set(draws(GenerationOptions(temperature=1e-6, seed=0), logits, 20).tolist()) == {1}


def test_the_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    logits = np.array([2.0, -2.0, 0.0, 2.0], np.float32)
    penalise_repetition(logits, np.array([True, True, True, False]), 2.0)
    assert logits.tolist() == [1.0, -4.0, 0.0, 2.0]


@pytest.mark.parametrize("checkpoint", ["tiny-mini", "small-mini", "base-mini"])
@pytest.mark.parametrize("case", ["one", "text", "tiled"])
def test_greedy_draws_equal_the_recorded_ids(checkpoint: str, case: str) -> None:
    with np.load(GOLDENS / checkpoint / "golden" / "generation.npz") as recorded:
        logits, ids = recorded[f"{case}/step_logits"][0], recorded[f"{case}/ids"][0]
    sampler = Sampler(GenerationOptions(), NONE, logits.shape[1])
    assert [sampler.draw(row.copy()) for row in logits] == ids.tolist()


@given(st.integers(0, 2 ** 32), st.floats(1.01, 2))
def test_prompt_and_drawn_tokens_are_both_penalised(seed: int, penalty: float) -> None:
    logits = np.random.default_rng(seed).normal(size=50).astype(np.float32)
    sampler = Sampler(GenerationOptions(repetition_penalty=penalty), np.array([3, 7, 3]), 50)
    seen = {3, 7}
    for _ in range(10):
        expected = [value if token not in seen else
                    (value / np.float32(penalty) if value > 0 else value * np.float32(penalty))
                    for token, value in enumerate(logits)]
        drawn = sampler.draw(logits.copy())
        assert drawn == int(np.argmax(expected))
        seen.add(drawn)


@pytest.mark.parametrize("options", [
    dict(max_new_tokens=0), dict(temperature=-1), dict(temperature=float("nan")), dict(top_p=0), dict(top_p=1.1),
    dict(repetition_penalty=0), dict(stop=("",)), dict(stop="END"), dict(seed=-1), dict(prefill_chunk=0),
    dict(frequency_penalty=float("nan")), dict(presence_penalty=float("inf")), dict(top_logprobs=-1),
])
def test_an_impossible_option_is_refused_by_name(options: dict) -> None:
    (name, _), = options.items()
    with pytest.raises(VL2Error, match=f"{name} is .*, expected"):
        GenerationOptions(**options)


@given(st.integers(0, 2 ** 32), st.floats(-2, 2), st.floats(-2, 2))
def test_frequency_and_presence_penalties_count_the_answer_and_not_the_prompt(seed: int, frequency, presence) -> None:
    logits = np.random.default_rng(seed).normal(size=12).astype(np.float32)
    options = GenerationOptions(frequency_penalty=frequency, presence_penalty=presence)
    sampler, counts = Sampler(options, np.array([0, 1, 2]), 12), np.zeros(12)
    for _ in range(15):
        expected = logits - counts * frequency - (counts > 0) * presence
        drawn = sampler.draw(logits.copy())
        assert expected[drawn] >= expected.max() - PENALISED_LOGIT
        counts[drawn] += 1


@given(st.integers(0, 2 ** 32), st.sampled_from([0.0, 0.8]), st.sampled_from([0.3, 1.0]),
       st.sets(st.integers(0, 29), min_size=1))
def test_only_allowed_tokens_are_drawn(seed: int, temperature: float, top_p: float, allowed: set[int]) -> None:
    logits = np.random.default_rng(seed).normal(size=30).astype(np.float32)
    mask = np.isin(np.arange(30), list(allowed))
    sampler = Sampler(GenerationOptions(temperature=temperature, top_p=top_p, seed=seed), NONE, 30)
    drawn = [sampler.draw(logits.copy(), mask) for _ in range(20)]
    assert set(drawn) <= allowed
    if temperature == 0.0:
        assert set(drawn) == {int(np.argmax(np.where(mask, logits, -np.inf)))}

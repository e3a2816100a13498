from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import GOLDENS
from vl2.calib.demands import check_memory, layer_work, peak_bytes
from vl2.config import LanguageConfig, ModelConfig
from vl2.errors import VL2Error
from vl2.json_file import read_json

GIGABYTE = 10**9


def published(name: str) -> LanguageConfig:
    return ModelConfig.from_dict(read_json(GOLDENS / "published" / f"{name}.config.json")).language_config


def lengths(tokens: int, longest: int = 1024) -> list[int]:
    return [longest] * (tokens // longest) + [tokens % longest or 1]


def test_tiny_with_32k_tokens_stays_below_two_gigabytes() -> None:
    assert peak_bytes(published("tiny"), 32768, 2048) < 2 * GIGABYTE


@settings(max_examples=40, deadline=None)
@given(limit=st.floats(0.9, 3), tokens=st.integers(5_000, 500_000), name=st.sampled_from(["tiny", "small", "base"]))
def test_what_is_said_to_fit_fits(limit: float, tokens: int, name: str) -> None:
    config, limit_bytes = published(name), int(limit * GIGABYTE)
    try:
        check_memory(config, lengths(tokens), limit_bytes)
    except VL2Error as error:
        found = re.search(r"about (\d+) tokens would fit", error.hint)
        if found:
            assert peak_bytes(config, int(found[1]), 1024) <= limit_bytes
            assert int(found[1]) < tokens
        else:
            assert "no calibration fits" in error.hint
    else:
        assert peak_bytes(config, tokens, 1024) <= limit_bytes


def test_without_a_limit_nothing_is_refused() -> None:
    check_memory(published("base"), lengths(10_000_000), None)


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_work_grows_in_proportion_to_tokens_and_every_step_has_some(name: str) -> None:
    config = published(name)
    for l in (0, config.num_hidden_layers - 1):
        one, ten = layer_work(config, l, 1000), layer_work(config, l, 10_000)
        assert all(amount > 0 for amount in one.values())
        assert {step: pytest.approx(10 * amount) for step, amount in one.items()} == ten


def test_memory_grows_with_tokens_and_sequence_length() -> None:
    config = dataclasses.replace(published("small"))
    assert peak_bytes(config, 1000, 500) < peak_bytes(config, 2000, 500) <= peak_bytes(config, 2000, 4000)

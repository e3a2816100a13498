"""The repetition guard against a slow reading of its rule, and on what answers repeat with reason."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from vl2.runtime.repetition import LEAST_REPEATS, LEAST_TOKENS, LONGEST_BLOCK, RepetitionGuard

ROOT = Path(__file__).parents[2]
TOKENIZER = Tokenizer.from_file(str(ROOT / "nano" / "checkpoint" / "tokenizer.json"))
BLOCKS = st.lists(st.integers(0, 3), min_size=1, max_size=90)


def acts_at(ids: list[int]) -> tuple[int, int] | None:
    """(tokens taken, block) when the guard acts."""
    guard = RepetitionGuard()
    return next(((taken, block) for taken, token in enumerate(ids, 1) if (block := guard.push(token))), None)


def slow_block(ids: list[int]) -> int | None:
    """The shortest block in which `ids` end by the rule."""
    for block in range(1, min(len(ids), LONGEST_BLOCK) + 1):
        covered = max(LEAST_REPEATS * block, LEAST_TOKENS)
        if covered <= len(ids) and ids[-covered + block:] == ids[-covered:len(ids) - block]:
            return block
    return None


@given(st.lists(st.integers(0, 3), max_size=30), BLOCKS, st.integers(1, 80))
def test_the_guard_acts_where_a_slow_reading_of_the_rule_does(before: list, block: list, times: int) -> None:
    ids = (before + block * times)[:600]
    found = acts_at(ids)
    if found is None:
        assert slow_block(ids) is None
    else:
        assert slow_block(ids[:found[0]]) == found[1] and slow_block(ids[:found[0] - 1]) is None


@given(BLOCKS, st.integers(0, 5))
def test_a_loop_is_ended_as_soon_as_it_has_six_rounds_and_256_tokens(block: list, first: int) -> None:
    found = acts_at([*range(100, 100 + first), *block * 300])
    assert found is not None and len(block) % found[1] == 0
    assert found[0] <= first + max(LEAST_TOKENS, LEAST_REPEATS * found[1])


@given(st.integers(1, 400), st.integers(0, 255))
def test_less_than_256_equal_tokens_never_are_a_loop(token: int, times: int) -> None:
    assert acts_at([token] * times + [token + 1]) is None


VALUES = st.sampled_from(["0", "0.00", "yes", "n/a", "-", "1,250.00"])


@settings(max_examples=15)
@given(VALUES, st.integers(2, 6), st.integers(1, 60))
def test_a_table_with_the_same_value_in_all_rows_is_no_loop(value: str, columns: int, rows: int) -> None:
    table = "\n".join(f"| item {row} | " + " | ".join([value] * columns) + " |" for row in range(1, rows + 1))
    assert acts_at(TOKENIZER.encode(table, add_special_tokens=False).ids) is None


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 4), min_size=1, max_size=60, unique=True))
def test_a_list_of_boxes_that_differ_is_no_loop(corners: list) -> None:
    boxes = ", ".join(str([number * 100 for number in box]) for box in corners)
    text = f"<|ref|>cup<|/ref|><|det|>[{boxes}]<|/det|>"
    assert acts_at(TOKENIZER.encode(text, add_special_tokens=False).ids) is None


@pytest.mark.parametrize("text", ["-" * 80, "." * 200, "|---" * 12 + "|", "ha " * 40, "\n".join(["0 0 0 0"] * 20)])
def test_rules_dots_and_twenty_equal_rows_are_no_loop(text: str) -> None:
    assert acts_at(TOKENIZER.encode(text, add_special_tokens=False).ids) is None


def test_a_long_answer_costs_as_much_a_token_as_a_short_one() -> None:
    guard = RepetitionGuard()
    random = np.random.default_rng(0)
    assert all(guard.push(int(token)) is None for token in random.integers(0, 50, 5000))
    assert sum(array.nbytes for array in vars(guard).values()) == 3 * 8 * LONGEST_BLOCK


def test_the_guard_acts_on_none_of_the_right_answers_of_nanos_held_out_set() -> None:
    """Neither alone nor in one answer after the other, which is longer than any of them."""
    lines = (ROOT / "nano" / "heldout" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    ids = [TOKENIZER.encode(answer, add_special_tokens=False).ids for answer in answers]
    assert len(ids) > 600 and not any(map(acts_at, ids))
    assert acts_at([token for answer in ids for token in answer]) is None

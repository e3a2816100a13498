"""Whether a box can still get ordered corners, against trying all that it can become."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl2.runtime.box_order import BoxOrder, can_be_ordered

CORNERS = st.tuples(*[st.integers(0, 999)] * 4)


@given(CORNERS, st.integers(0, 30))
def test_every_beginning_of_an_ordered_box_can_be_ordered(corners: tuple, length: int) -> None:
    x1, y1, x2, y2 = corners
    box = f"{min(x1, x2)}, {min(y1, y2)}, {max(x1, x2)}, {max(y1, y2)}]"
    assert can_be_ordered(box[:length])


@given(CORNERS)
def test_a_finished_box_is_judged_by_its_corners(corners: tuple) -> None:
    x1, y1, x2, y2 = corners
    assert can_be_ordered(f"{x1}, {y1}, {x2}, {y2}]") == (x1 <= x2 and y1 <= y2)


@given(st.integers(0, 999), st.text("0123456789", min_size=1, max_size=3).filter(lambda d: d == "0" or d[0] != "0"))
def test_a_number_is_refused_only_where_no_digits_can_make_it_large_enough(low: int, digits: str) -> None:
    longer = [digits + more for more in ("", *map(str, range(10)), *map("{:02}".format, range(100)))]
    numbers = [int(number) for number in longer if len(number) <= 3] if digits != "0" else [0]
    assert can_be_ordered(f"{low}, 5, {digits}") == (max(numbers) >= low)
    assert can_be_ordered(f"{low}, 5, {digits}, ") == (int(digits) >= low)


TEXTS = ["<|det|>", "<|/det|>", "0", "4", "50", ", ", ", 7", "]]", "], [3, 3, 2"]


def left(said: list[str], allowed: list[str]) -> list[str]:
    """Which of the tokens that a grammar allows are left after `said`."""
    order = BoxOrder({index: text.encode() for index, text in enumerate(TEXTS)})
    for text in said:
        order.push(TEXTS.index(text))
    mask = np.isin(np.arange(len(TEXTS)), [TEXTS.index(text) for text in allowed])
    order.narrow(mask)
    return [text for text, kept in zip(TEXTS, mask, strict=True) if kept]


BEFORE = ["<|det|>", "50", ", 7", ", "]


@pytest.mark.parametrize("said, allowed, expected", [
    (BEFORE, ["0", "4", "50"], ["4", "50"]),  # 4 may become 400
    ([*BEFORE, "4"], ["0", "4", ", 7"], ["0", "4"]),  # 40 may become 400, 4 is less than 50
    ([*BEFORE, "50"], [", ", ", 7"], [", ", ", 7"]),
    ([*BEFORE, "50", ", 7"], ["]]", "4"], ["4", "]]"]),
    ([*BEFORE, "50", ", 7"], ["]]", "], [3, 3, 2"], ["]]", "], [3, 3, 2"]),
    (["<|det|>", "50", ", 7", ", 7"], ["0", ", "], ["0"]),
    ([*BEFORE, "50", ", 7", "<|/det|>"], ["0", "4", "]]"], ["0", "4", "]]"]),
    (["50", ", 7", ", "], ["0", "4", "50"], ["0", "4", "50"]),
])
def test_tokens_are_taken_away_inside_a_list_only(said: list[str], allowed: list[str], expected: list[str]) -> None:
    assert left(said, allowed) == expected

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.tolerances import LOGPROB
from vl2.runtime.logprobs import describe_token, log_probabilities

LOGITS = st.lists(st.sampled_from([-1e4, -3.0, 0.0, 0.5, 2.0, 30.0]), min_size=1, max_size=40)


class Letters:
    """Bytes of a tokenizer whose ids are letters."""

    def __getitem__(self, token: int) -> bytes:
        return bytes([97 + token])


@given(LOGITS)
def test_probabilities_sum_to_one_even_where_logits_are_far_apart(logits: list[float]) -> None:
    found = log_probabilities(np.array(logits, np.float32))
    assert found.dtype == np.float64 and abs(np.exp(found).sum() - 1) < LOGPROB


@given(LOGITS, st.integers(0, 60))
def test_the_likeliest_come_first_and_equal_ones_by_id(logits: list[float], top: int) -> None:
    logprobs = log_probabilities(np.array(logits, np.float32))
    found = describe_token(logprobs, len(logits) - 1, top, Letters())
    order = sorted(range(len(logits)), key=lambda token: (-logprobs[token], token))[:top]
    assert found.top == tuple((token, bytes([97 + token]), logprobs[token]) for token in order)


def test_a_part_of_a_character_is_shown_as_a_replacement_and_kept_in_bytes() -> None:
    entry = describe_token(np.zeros(3), 1, 0, {1: "é".encode()[:1]}).to_dict()
    assert (entry["text"], entry["bytes"], entry["top"]) == ("\ufffd", [0xC3], [])

from hypothesis import given
from hypothesis import strategies as st

from vl2.accuracy.edit_distance import edit_distance, similarity

WORDS = st.text("abc", max_size=12)


def slow_distance(a: str, b: str) -> int:
    """The table of Wagner and Fischer."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


@given(WORDS, WORDS)
def test_the_distance_is_that_of_the_table(a: str, b: str) -> None:
    assert edit_distance(a, b) == slow_distance(a, b)


def test_known_distances() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3 and edit_distance("abc", "") == 3 and edit_distance("", "") == 0
    assert edit_distance("the cat sat".split(), "the cat".split()) == 1


@given(WORDS, WORDS, WORDS)
def test_the_distance_is_symmetric_and_keeps_the_triangle(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_long_texts_span_many_machine_words() -> None:
    text = "lorem ipsum dolor " * 100
    assert edit_distance(text, text[:700] + "X" + text[701:]) == 1


def test_similarity_is_one_for_equal_and_nought_for_different() -> None:
    assert similarity("", "") == 1 and similarity("abcd", "abcd") == 1 and similarity("ab", "cd") == 0
    assert similarity("abcd", "abcx") == 0.75

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from vl2.errors import VL2Error
from vl2.runtime.detokenize import TextStream, TokenBytes, byte_alphabet, first_stop, held_back

GOLDENS = Path(__file__).parents[1] / "goldens"
TOKENIZER = Tokenizer.from_file(str(GOLDENS / "tiny-mini" / "tokenizer.json"))
BYTES = TokenBytes(TOKENIZER, hidden=())
IDS = st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40)
LETTERS = st.text(alphabet="abc", max_size=12)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


class Bytes(dict):
    """A token for each byte string."""

    def __missing__(self, key):
        return key


def pieces_of(tokens, token_bytes, stop=()) -> list[str]:
    stream = TextStream(token_bytes, stop)
    pieces = [stream.push(token) for token in tokens] + [stream.finish()]
    assert "".join(pieces) == stream.text
    return pieces


@given(IDS)
def test_streamed_text_equals_decoding_all_tokens_at_once(ids: list[int]) -> None:
    assert "".join(pieces_of(ids, BYTES)) == TOKENIZER.decode(ids, skip_special_tokens=False)


@given(st.text(max_size=30))
def test_text_survives_encoding_and_streaming(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert "".join(pieces_of(ids, BYTES)) == TOKENIZER.decode(ids, skip_special_tokens=False)


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=20), st.data())
def test_no_split_of_the_bytes_ever_shows_half_a_character(text: str, data) -> None:
    content = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8)))
    parts = [content[start:end] for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    pieces = pieces_of(parts, Bytes())
    assert "".join(pieces) == text
    assert all("�" not in piece for piece in pieces if "�" not in text)


@given(st.lists(st.binary(max_size=5), max_size=10))
def test_any_bytes_give_the_text_of_all_of_them(parts: list[bytes]) -> None:
    assert "".join(pieces_of(parts, Bytes())) == b"".join(parts).decode("utf-8", "replace")


def test_an_unfinished_character_is_shown_as_replacement_only_at_the_end() -> None:
    assert pieces_of(["é".encode()[:1]], Bytes()) == ["", "�"]


def test_the_byte_alphabet_is_a_bijection_that_keeps_ascii() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert alphabet["A"] == 65 and alphabet["Ġ"] == 32 and alphabet["Ċ"] == 10


def test_grounding_tokens_are_text_and_hidden_tokens_are_not() -> None:
    hidden = TokenBytes(TOKENIZER, hidden=(0, 1, 2))
    ids = [0, *TOKENIZER.encode("<|ref|>cup<|/ref|>", add_special_tokens=False).ids, 1]
    assert "".join(pieces_of(ids, hidden)) == "<|ref|>cup<|/ref|>"


def test_an_id_beyond_the_tokenizer_stands_for_no_text() -> None:
    assert BYTES[639] == b""


def test_a_tokenizer_that_is_not_byte_level_is_refused() -> None:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(VL2Error, match="WordPiece, expected ByteLevel"):
        TokenBytes(tokenizer, ())


def letter_by_letter(text: str, stop: list[str]) -> str:
    """The slow truth: grow the text by a letter until it ends with a stop string, the longest of them."""
    for end in range(1, len(text) + 1):
        found = [len(string) for string in stop if text[:end].endswith(string)]
        if found:
            return text[:end - max(found)]
    return text


@given(LETTERS, STOPS, st.data())
def test_text_ends_before_the_first_stop_string_however_it_is_cut(text: str, stop: list[str], data) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    parts = [text[start:end].encode() for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    pieces = pieces_of(parts, Bytes(), stop)
    assert "".join(pieces) == letter_by_letter(text, stop)


@given(LETTERS, STOPS)
def test_what_is_held_back_is_the_longest_possible_beginning_of_a_stop_string(text: str, stop: list[str]) -> None:
    lengths = [length for length in range(len(text) + 1)
               if length == 0 or any(string[:length] == text[-length:] and length < len(string) for string in stop)]
    assert held_back(text, stop) == max(lengths)


def test_nothing_follows_a_stop_string() -> None:
    stream = TextStream(Bytes(), ["END"])
    assert [stream.push(part) for part in (b"one E", b"ND two", b" three")] == ["one ", "", ""]
    assert stream.stopped and stream.finish() == "" and stream.text == "one "


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert first_stop("xabcx", ["abc", "b"]) == 2
    assert first_stop("xabx", ["ab", "b"]) == 1
    assert first_stop("x", []) is None

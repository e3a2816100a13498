from pathlib import Path

import pytest

from vl2.nano.geometry import write_description
from vl2.nano.questions import PHRASINGS
from vl2.nano.tokenizer import LATE_SPECIALS, VOCAB_SIZE, vocabulary
from vl2.prompt import Processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    folder: Path = tmp_path_factory.mktemp("nano")
    write_description(folder)
    return Processor.from_folder(folder)


def encode(processor: Processor, text: str) -> list[int]:
    return processor.tokenizer.encode(text, add_special_tokens=False).ids


def test_any_text_survives_encoding_and_decoding(processor):
    for text in ("Milk 3.50\nTotal 12", "ünïcödé 漢字 🙂", " leading and trailing ", "a\tb\r\nc", "<|ref|>x<|/ref|>"):
        assert processor.tokenizer.decode(encode(processor, text), skip_special_tokens=False) == text


def test_words_of_documents_are_spelt_one_byte_a_token(processor):
    assert len(encode(processor, "K7-Q42")) == 6
    assert len(encode(processor, "Tomato")) == 6


# The vocabulary was trained without them; they are spelt byte by byte.
SPELT = {"high"}


def test_every_word_of_a_phrasing_is_one_token(processor):
    for phrasings in PHRASINGS.values():
        for phrasing in phrasings:
            words = phrasing.replace("<|ref|>", " ").replace("<|/ref|>", " ").replace("{}", " ").split()
            letters = [word.strip("?.,") for word in words if word.strip("?.,")]
            for i, word in enumerate(letters):
                if word in SPELT:
                    continue
                assert len(encode(processor, word if i == 0 else " " + word)) == 1, word


def test_special_tokens_are_single_ids_in_the_family_s_order(processor):
    ids = [encode(processor, token) for token in LATE_SPECIALS]
    assert [len(one) for one in ids] == [1] * len(LATE_SPECIALS)
    assert ids == sorted(ids)
    assert (processor.bos_id, processor.eos_id, processor.pad_id) == (0, 1, 2)


def test_every_token_has_a_row_in_the_embedding_table():
    assert sorted(vocabulary().values()) == list(range(len(vocabulary())))
    assert len(vocabulary()) <= VOCAB_SIZE

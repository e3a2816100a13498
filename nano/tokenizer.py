"""The tokenizer of vl2-nano: byte-level BPE without merges, plus the words that questions are made of.

Answers are spelt out byte by byte, so copying from an image is one token a character. Question words are whole
vocabulary entries (`ignore_merges` takes a pre-token that is in the vocabulary as it is), which shortens prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
# In the family's order; they follow the ordinary tokens.
LATE_SPECIALS = ("<image>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", "<|User|>", "<|Assistant|>")
VOCAB_SIZE = 384

# Pre-tokens (with their leading blank) that occur in questions; capitalised ones also start one without a blank.
QUESTION_WORDS = (
    "What", "Which", "Where", "How", "Read", "Locate", "Find", "Give", "Transcribe", "is", "are", "the", "does", "it",
    "say", "text", "all", "of", "in", "line", "word", "written", "here", "value", "bar", "highest", "lowest", "many",
    "there", "colour", "shapes", "circles", "squares", "triangles", "stars", "circle", "square", "triangle", "star",
    "price", "total", "name", "image", "for", "item", "costs", "has", "read", "shop", "row", "column", "shown", "box",
    "much", "cost", "city", "date", "phone", "code", "age", "job", "room", "order", "time",
    "red", "green", "blue", "yellow", "purple", "orange", "black", "white",
)
_PRE_TOKENS = r"[\r\n]+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def byte_symbols() -> dict[int, str]:
    """Byte → the printable character that stands for it in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table


def vocabulary() -> dict[str, int]:
    """Token → id: bos, eos, pad, 256 bytes, question words, late special tokens."""
    words = ["Ġ" + word for word in QUESTION_WORDS] + [w for w in QUESTION_WORDS if w[0].isupper()] + ["ĊĊ"]
    tokens = [BOS, EOS, PAD, *byte_symbols().values(), *words, *LATE_SPECIALS]
    assert len(set(tokens)) == len(tokens) <= VOCAB_SIZE, "vocabulary has duplicates or is larger than VOCAB_SIZE"
    return {token: index for index, token in enumerate(tokens)}


def _added(token: str, special: bool = True) -> dict:
    flags = {"content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {**flags, "special": special}


def tokenizer_json() -> dict:
    """The content of tokenizer.json."""
    vocab = vocabulary()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _PRE_TOKENS}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[token], **_added(token)} for token in (BOS, EOS, PAD, *LATE_SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": vocab, "merges": [],
        },
    }


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json in the family's form."""
    vocab = vocabulary()
    plain = {token: _added(token) for token in (BOS, EOS, PAD, *LATE_SPECIALS)}
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    chat = ["<|User|>", "<|Assistant|>"]
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(vocab[token]): plain[token] for token in plain},
        "additional_special_tokens": chat,
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "processor_class": "DeepseekVLV2Processor",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": None,
    }
    special = {"additional_special_tokens": [dict(plain[token]) for token in chat]}
    special |= {name: dict(plain[token]) for name, token in names.items()}
    for entry in [*special["additional_special_tokens"], *(special[name] for name in names)]:
        entry.pop("special", None)
    contents = {
        "tokenizer.json": tokenizer_json(), "tokenizer_config.json": settings, "special_tokens_map.json": special,
    }
    for name, content in contents.items():
        text = json.dumps(content, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
        (folder / name).write_text(text + "\n", encoding="utf-8")

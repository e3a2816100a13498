"""Token ids to text while they come: never half a character, never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders

from vl2.errors import VL2Error


def byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE: printable Latin-1 stands for itself, the rest for U+0100 and up in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


class TokenBytes:
    """The bytes a token id stands for; hidden tokens and ids that the tokenizer lacks stand for none."""

    def __init__(self, tokenizer: Tokenizer, hidden: Iterable[int]):
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise VL2Error(f"the tokenizer decodes with {type(tokenizer.decoder).__name__}, expected ByteLevel",
                           "is this the tokenizer.json of a DeepSeek-VL2 model?")
        self._tokenizer = tokenizer
        self._known = {token_id: b"" for token_id in hidden}

    def __getitem__(self, token_id: int) -> bytes:
        if token_id not in self._known:
            token = self._tokenizer.id_to_token(token_id) or ""
            in_alphabet = all(character in _ALPHABET for character in token)
            # An added token may hold characters outside the alphabet; it is then text, not bytes.
            self._known[token_id] = bytes(map(_ALPHABET.get, token)) if in_alphabet else token.encode()
        return self._known[token_id]


class TextStream:
    """Text of tokens pushed one by one, as far as it is certain; the whole equals decoding all tokens at once.

    stopped: a stop string has come; the text ends before it and nothing more is taken.
    """

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str] = ()):
        self._bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that this token makes certain, maybe empty."""
        return self._take(self._utf8.decode(self._bytes[token_id]), final=False)

    def finish(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD."""
        return self._take(self._utf8.decode(b"", final=True), final=True)

    def _take(self, piece: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        cut = first_stop(text, self._stop)
        if cut is not None:
            self.stopped = True
            certain, self._held = text[:cut], ""
        else:
            held = 0 if final else held_back(text, self._stop)
            certain, self._held = text[:len(text) - held], text[len(text) - held:]
        self.text += certain
        return certain


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first, so that the way the text came in pieces does not matter."""
    starts = [(text.find(string), len(string)) for string in stop]
    found = [(start + length, start) for start, length in starts if start >= 0]
    return min(found)[1] if found else None


def held_back(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of the stop strings."""
    longest = max((len(string) - 1 for string in stop), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(len(string) > length and string.startswith(text[-length:]) for string in stop):
            return length
    return 0

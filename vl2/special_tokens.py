"""The tokenizer of a checkpoint with every special token the model needs, their ids taken from its files (spec 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from vl2.errors import VL2Error
from vl2.json_file import read_json

REF_OPEN, REF_CLOSE = "<|ref|>", "<|/ref|>"
DET_OPEN, DET_CLOSE = "<|det|>", "<|/det|>"
GROUNDING = "<|grounding|>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that prompts and generation place by hand."""

    bos_id: int
    eos_id: int
    pad_id: int
    image_id: int


def load_tokenizer(folder: Path, image_token: str, pad_token: str) -> tuple[Tokenizer, SpecialTokens]:
    """The tokenizer of `folder` and its special ids.

    Missing pad, image, grounding and chat tokens are added at the end, in the original's order.
    Raises VL2Error when the files are missing or broken, or name no bos or eos token.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise VL2Error(f"{path} is missing", "copy tokenizer.json from the model's repository into the folder")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise VL2Error(f"{path} is not a tokenizer file: {error}", "fetch the file again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    names = _named_tokens(folder)
    pad = names.get("pad_token", pad_token)
    _add_missing(tokenizer, [pad, image_token, REF_OPEN, REF_CLOSE, DET_OPEN, DET_CLOSE, GROUNDING, USER, ASSISTANT])
    ids = {}
    for role in ("bos_token", "eos_token"):
        if role not in names or tokenizer.token_to_id(names[role]) is None:
            raise VL2Error(
                f"{folder}: {role} is {names.get(role)!r}, expected a token of tokenizer.json",
                "special_tokens_map.json (or tokenizer_config.json) names it; copy it from the model's repository",
            )
        ids[role] = tokenizer.token_to_id(names[role])
    special = SpecialTokens(
        ids["bos_token"], ids["eos_token"], tokenizer.token_to_id(pad), tokenizer.token_to_id(image_token)
    )
    return tokenizer, special


def _named_tokens(folder: Path) -> dict[str, str]:
    """Role → token text from special_tokens_map.json; newer folders keep it in tokenizer_config.json only."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            entries = read_json(folder / name)
            roles = (role for role in ("bos_token", "eos_token", "pad_token") if entries.get(role) is not None)
            return {role: _text(entries[role], folder / name, role) for role in roles}
    raise VL2Error(
        f"{folder}: neither special_tokens_map.json nor tokenizer_config.json is there",
        "copy both from the model's repository into the folder",
    )


def _text(token: object, path: Path, role: str) -> str:
    """A token is its text, or an object that has it as `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise VL2Error(f"{path}: {role} is {token!r}, expected a token's text or an object with its `content`",
                       "fetch the file again")
    return text


def _add_missing(tokenizer: Tokenizer, tokens: list[str]) -> None:
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in tokens:
        if token not in present:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])

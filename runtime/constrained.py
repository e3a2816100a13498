"""Which tokens keep an answer within its constraint, from llguidance (extra `[constrained]`)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from vl2.errors import VL2Error
from vl2.runtime.constraints import Constraint

_INSTALL = "pip install 'vl2-edge[constrained]'"
# Marks are single tokens; text and labels that only spell them out would be read as marks all the same.
_BOXES = r"""
start: TEXT? (grounded TEXT?)*
grounded: <|ref|> LABEL <|/ref|> <|det|> "[" box (", " box)* "]" <|/det|>
box: "[" NUMBER ", " NUMBER ", " NUMBER ", " NUMBER "]"
NUMBER: /0|[1-9][0-9]{0,2}/
TEXT: /(?s:.+)/ & ~/(?s:.*)<\|\/?(ref|det)\|>(?s:.*)/
LABEL: /.+/ & ~/.*<\|\/?(ref|det)\|>.*/
"""


def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_id: int) -> Any:
    """llguidance's view of a tokenizer; a second of work for 100,000 tokens, so make it once a model.

    Raises VL2Error when llguidance is not installed.
    """
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise VL2Error(f"constrained answers need the package llguidance: {error}", _INSTALL) from error
    return LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=eos_id)


class Matcher:
    """How far one answer has come in its constraint.

    Raises VL2Error for a regular expression or schema that llguidance cannot read.
    """

    def __init__(self, constraint: Constraint, tokenizer: Any):
        from llguidance import LLMatcher

        grammar = _grammar(constraint)
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
        if failed:
            raise VL2Error(f"the {constraint.kind} of the constraint cannot be used: {messages[0]}",
                           _HINTS[constraint.kind])
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)

    def allowed(self) -> np.ndarray:
        """bool [V]: the tokens that may come next; the end token where the answer may end."""
        mask = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) != 0
        self._check()
        return mask

    def push(self, token: int) -> bool:
        """Takes the next token; True when the answer cannot go on after it."""
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise VL2Error(f"the constraint cannot be followed any further: {self._matcher.get_error()}",
                           "make the regular expression or schema simpler")


_HINTS = {
    "regex": "see https://docs.rs/regex for the syntax: no look-around and no back-references",
    "json_schema": 'give a JSON schema, such as {"type": "object", "properties": {"total": {"type": "number"}}}',
    "json_object": None, "boxes": "is this the tokenizer of a DeepSeek-VL2 model?",
}


def _grammar(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "boxes":
        return LLMatcher.grammar_from_lark(_BOXES)
    schema = constraint.text if constraint.kind == "json_schema" else '{"type": "object"}'
    try:
        json.loads(schema)
        return LLMatcher.grammar_from_json_schema(schema)
    except ValueError as error:
        raise VL2Error(f"the JSON schema of the constraint is no JSON: {error}", _HINTS["json_schema"]) from error

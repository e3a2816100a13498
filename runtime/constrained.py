"""Which tokens keep an answer within its constraint, from llguidance (extra `[constrained]`)."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from vl2.errors import VL2Error
from vl2.runtime.box_order import BoxOrder
from vl2.runtime.constraints import Constraint
from vl2.runtime.detokenize import TokenBytes

log = logging.getLogger("vl2.runtime")

# Marks are single tokens; text and labels that only spell them out would be read as marks all the same.
_BOXES = r"""
start: TEXT? (grounded TEXT?)*
grounded: <|ref|> LABEL <|/ref|> <|det|> "[" box (", " box)* "]" <|/det|>
box: "[" NUMBER ", " NUMBER ", " NUMBER ", " NUMBER "]"
NUMBER: /0|[1-9][0-9]{0,2}/
TEXT: /(?s:.+)/ & ~/(?s:.*)<\|\/?(ref|det)\|>(?s:.*)/
LABEL: /.+/ & ~/.*<\|\/?(ref|det)\|>.*/
"""
# llguidance makes a state for each remainder: 20,000 take 0.25 s of one core and 10 MB, 999,983 take 13 s and 480 MB.
_MOST_REMAINDERS = 20_000
# What brings the `multipleOf` of two places together; the states are then those of their least common multiple.
_COMBINING = frozenset({"allOf", "anyOf", "oneOf", "$ref", "patternProperties"})
# Of an error of llguidance: behind this mark comes its own state, which says nothing to a user.
_INTERNALS = "<state>"
_EXCERPT = re.compile(r" *\d+ \| ")
_LONGEST_REASON = 300
# One line, as json.dumps writes it: a weak model may fill an answer with free white space.
_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_HINTS = {
    "regex": "see https://docs.rs/regex for the syntax: no look-around and no back-references",
    "json_schema": 'give a JSON schema, such as {"type": "object", "properties": {"total": {"type": "number"}}}',
    "json_object": None,
    "boxes": "is this the tokenizer of a DeepSeek-VL2 model?",
}


def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_id: int) -> Any:
    """llguidance's view of a tokenizer; a second of work for 100,000 tokens, so make it once a model.

    Raises VL2Error when llguidance is not installed.
    """
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise VL2Error(f"answers with a constraint need the package llguidance: {error}",
                       "pip install '.[constrained]' in vl2's folder") from error
    return LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=eos_id)


class Matcher:
    """How far one answer has come in its constraint.

    Raises VL2Error for a regular expression or schema that llguidance cannot read.
    """

    def __init__(self, constraint: Constraint, tokenizer: Any, token_bytes: TokenBytes):
        from llguidance import LLMatcher

        self._matcher = LLMatcher(tokenizer, _grammar(constraint), log_level=0)
        if self._matcher.is_error():
            raise VL2Error(f"the {constraint.kind} of the constraint cannot be used: {self._reason()}",
                           _HINTS[constraint.kind])
        for warning in self._matcher.get_grammar_warnings():
            log.warning("constraint: %s", warning)
        self._order = BoxOrder(token_bytes) if constraint.kind == "boxes" else None

    def allowed(self) -> np.ndarray:
        """bool [V]: the tokens that may come next; the end token where the answer may end."""
        mask = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) != 0
        self._check()
        if self._order is not None:
            self._order.narrow(mask)
        return mask

    def push(self, token: int) -> bool:
        """Takes the next token; True when nothing can follow it but the end."""
        self._matcher.consume_token(token)
        self._check()
        if self._order is not None:
            self._order.push(token)
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise VL2Error(f"the constraint cannot be followed any further: {self._reason()}",
                           "make the regular expression or schema simpler")

    def _reason(self) -> str:
        """llguidance's error on one line, without arrows and the lines of its own grammar that they point at."""
        lines = self._matcher.get_error().partition(_INTERNALS)[0].splitlines()
        told = [line for line in lines if line.strip(" ^") and not _EXCERPT.match(line)]
        reason, half = " ".join(" ".join(told).split()), _LONGEST_REASON // 2
        return reason if len(reason) <= _LONGEST_REASON else f"{reason[:half]} … {reason[-half:]}"


def _grammar(constraint: Constraint) -> str:
    from llguidance import LLMatcher, regex_to_lark

    if constraint.kind == "regex":
        # "d": \d is 0-9; in Unicode it is 700 digits more, which no reader of a number expects.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(constraint.text, 'd')}/")
    if constraint.kind == "boxes":
        return LLMatcher.grammar_from_lark(_BOXES)
    text = constraint.text if constraint.kind == "json_schema" else '{"type": "object"}'
    try:
        schema = json.loads(text)
        _check_remainders(schema)
        return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_FORM)
    except (TypeError, ValueError, RecursionError) as error:
        raise VL2Error(f"the JSON schema of the constraint cannot be read: {error}", _HINTS["json_schema"]) from error


def _check_remainders(schema: Any) -> None:
    """Raises VL2Error where the `multipleOf` of a schema would take too much time and memory to follow."""
    parts = list(_parts(schema))
    # A whole number and a decimal have the remainders of the numerator in lowest terms.
    numerators = {_numerator(part["multipleOf"]): part["multipleOf"] for part in parts
                  if _is_number(part.get("multipleOf"))}
    combined = any(not _COMBINING.isdisjoint(part) for part in parts)
    if sum(numerators) > _MOST_REMAINDERS or (combined and math.lcm(*numerators) > _MOST_REMAINDERS):
        largest = repr(numerators[max(numerators)])[:_LONGEST_REASON]
        raise VL2Error(f"the JSON schema of the constraint cannot be used: it has multipleOf {largest}, and the "
                       f"remainders of its multipleOf together are more than {_MOST_REMAINDERS:,}",
                       "leave multipleOf out and check the number yourself")


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """All objects of a schema, also those that are values or map names: which ones are, a property's name can feign."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and math.isfinite(value))


def _numerator(value: float) -> int:
    """In lowest terms, of the number as it is written in JSON: 0.1 is a tenth."""
    return abs(Fraction(Decimal(repr(value))).numerator)

"""What an answer must look like: a regular expression, JSON of a schema, or well-formed boxes."""

from __future__ import annotations

from dataclasses import dataclass

from vl2.errors import VL2Error

KINDS = ("regex", "json_schema", "json_object", "boxes")
_WITH_TEXT = ("regex", "json_schema")


@dataclass(frozen=True)
class Constraint:
    """What the whole answer must match.

    kind: "regex" (text: of the Rust regex crate's syntax, without look-around and back-references, \\d is 0-9),
    "json_schema" (text: the schema as JSON), "json_object" (any JSON object) or "boxes" (free text in which every label
    and its list of boxes is well formed, with ordered corners in 0…999); the last two have no text.
    """

    kind: str
    text: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise VL2Error(f"a constraint is of the kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        if bool(self.text) != (self.kind in _WITH_TEXT):
            expected = "some text" if self.kind in _WITH_TEXT else "none"
            raise VL2Error(f"a constraint of the kind {self.kind!r} has the text {self.text!r}, expected {expected}")

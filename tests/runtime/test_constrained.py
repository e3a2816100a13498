"""Answers of an untrained model under a constraint: whatever its weights want, the answer has the form."""

import json
import re
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.small_bundle import numpy_model_of
from vl2.errors import VL2Error
from vl2.runtime import Answer, Constraint, GenerationOptions, Model
from vl2.runtime.constrained import Matcher

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "count", "kind"],
    "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["bill", "letter"]},
                   "count": {"type": "integer", "minimum": 3, "maximum": 40},
                   "sizes": {"type": "array", "items": {"type": "number"}}},
}
PATTERNS = [r"[0-9]{3}-[a-z]{2,5}", "(yes|no)(, because [a-z ]{1,20})?", "[あ-ん]{1,6}!", r"Sum: \d{1,4}\.\d{2} EUR/m"]


@pytest.fixture(scope="module")
def model(shared_bundle: Path) -> Model:
    return numpy_model_of(shared_bundle)


def ask(model: Model, constraint: Constraint, **options) -> Answer:
    options = {"max_new_tokens": 80, "constraint": constraint} | options
    return model.ask("What is shown?", options=GenerationOptions(**options))


DRAWS = {"seed": st.integers(0, 10_000), "temperature": st.sampled_from([0.0, 1.0, 5.0]),
         "repetition_penalty": st.sampled_from([1.0, 1.5]), "presence_penalty": st.sampled_from([0.0, 2.0])}


@settings(max_examples=30)
@given(st.sampled_from(PATTERNS), st.fixed_dictionaries(DRAWS))
def test_the_answer_matches_the_regular_expression(model: Model, pattern: str, draws: dict) -> None:
    answer = ask(model, Constraint("regex", pattern), **draws)
    assert answer.stop_reason == "eos" and re.fullmatch(pattern, answer.text, re.ASCII)


@settings(max_examples=30)
@given(st.fixed_dictionaries(DRAWS))
def test_the_answer_validates_against_the_schema(model: Model, draws: dict) -> None:
    answer = ask(model, Constraint("json_schema", json.dumps(SCHEMA)), **draws)
    if answer.stop_reason == "eos":
        jsonschema.validate(json.loads(answer.text), SCHEMA)
        assert "\n" not in answer.text
    else:
        assert answer.stop_reason in ("length", "loop")


@settings(max_examples=15)
@given(st.fixed_dictionaries(DRAWS))
def test_a_json_object_is_one(model: Model, draws: dict) -> None:
    answer = ask(model, Constraint("json_object"), **draws)
    assert answer.stop_reason == "length" or isinstance(json.loads(answer.text), dict)


@settings(max_examples=30)
@given(st.fixed_dictionaries(DRAWS), st.integers(1, 90))
def test_boxes_have_no_problems_up_to_the_cut_and_their_corners_are_ordered(model, draws: dict, limit: int) -> None:
    """An untrained model hardly ever says a mark, so that all four are made likely."""
    special = [model.engine.processor.tokenizer.token_to_id(f"<|{mark}|>") for mark in ("ref", "/ref", "det", "/det")]
    with pytest.MonkeyPatch.context() as patch:
        push_marks(patch, special)
        answer = ask(model, Constraint("boxes"), **draws, max_new_tokens=limit)
    problems = [problem for problem in answer.box_problems if answer.stop_reason != "length"]
    assert answer.stop_reason in ("eos", "length") and problems == []
    cut = answer.text.rfind("<|/det|>")
    assert all("no partner" in problem or "has no boxes" in problem for problem in answer.box_problems)
    whole = answer.text[:cut + len("<|/det|>")] if cut >= 0 else ""
    assert whole.count("<|ref|>") == whole.count("<|/det|>") <= len(answer.boxes)
    for box in answer.boxes:
        assert 0 <= box.x1 <= box.x2 <= 999 and 0 <= box.y1 <= box.y2 <= 999
        assert box.label and all(isinstance(corner, int) for corner in box.corners)


def push_marks(patch: pytest.MonkeyPatch, special: list[int]) -> None:
    from vl2.runtime.sampling import Sampler

    draw = Sampler.draw

    def likelier(self: Sampler, logits: np.ndarray, allowed: np.ndarray) -> int:
        logits[special] += 25
        return draw(self, logits, allowed)

    patch.setattr(Sampler, "draw", likelier)


def test_boxes_do_appear_when_marks_are_likely(model: Model) -> None:
    special = [model.engine.processor.tokenizer.token_to_id(f"<|{mark}|>") for mark in ("ref", "/ref", "det", "/det")]
    with pytest.MonkeyPatch.context() as patch:
        push_marks(patch, special)
        answers = [ask(model, Constraint("boxes"), temperature=3.0, seed=seed) for seed in range(5)]
    assert sum(len(answer.boxes) for answer in answers) > 5


def test_text_cannot_spell_a_mark_letter_by_letter(model: Model) -> None:
    tokenizer, engine = model.engine.processor.tokenizer, model.engine
    letters = [tokenizer.token_to_id(letter) for letter in "a<|det|"]
    matcher = Matcher(Constraint("boxes"), engine.grammar_tokenizer, engine.token_bytes)
    for letter in letters:
        assert matcher.allowed()[letter] and not matcher.push(letter)
    assert not matcher.allowed()[tokenizer.token_to_id(">")]


def test_a_cut_answer_is_reported_as_cut(model: Model) -> None:
    answer = ask(model, Constraint("regex", "[a-z]{50}"), max_new_tokens=3)
    assert answer.stop_reason == "length" and re.fullmatch("[a-z]{3,50}", answer.text)


def test_an_answer_that_cannot_go_on_ends_without_another_step(model: Model) -> None:
    model.engine.backend.runs.clear()
    answer = ask(model, Constraint("regex", "yes"))
    assert (answer.text, answer.stop_reason) == ("yes", "eos")
    assert sum(graph == "decoder" for graph, _ in model.engine.backend.runs) == len(answer.token_ids)


def test_without_a_constraint_the_answer_is_what_it_was(model: Model) -> None:
    free = model.ask("What is shown?", options=GenerationOptions(max_new_tokens=30))
    same = ask(model, Constraint("regex", "(?s:.*)"), max_new_tokens=30)
    assert same.token_ids == free.token_ids or "\ufffd" in free.text or "<" in free.text


@pytest.mark.parametrize("schema", [
    {"type": "integer", "multipleOf": 999_983}, {"type": "object", "properties": {"a": {"multipleOf": 20_001}}},
    {"type": "array", "items": [{"multipleOf": 9_973}, {"multipleOf": 9_967}, {"multipleOf": 9_949}]},
    {"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 101}]}, {"multipleOf": 10 ** 400},
    {"type": "number", "multipleOf": 1e300}, {"properties": {"const": {"multipleOf": 999_983}}},
    {"$defs": {"a": {"multipleOf": 199.83}}, "anyOf": [{"multipleOf": 101}]},
])
def test_multiples_of_which_there_are_too_many_remainders_are_refused(model, schema: dict) -> None:
    """999,983 would take 13 s and 480 MB of native code that nothing can stop."""
    with pytest.raises(VL2Error, match="multipleOf .* more than 20,000") as error:
        ask(model, Constraint("json_schema", json.dumps(schema)))
    assert error.value.hint


@pytest.mark.parametrize("schema", [
    {"type": "integer", "multipleOf": 9973}, {"type": "number", "multipleOf": 0.0001}, {"type": "number"},
    {"type": "object", "properties": {f"p{index}": {"type": "integer", "multipleOf": 9973} for index in range(9)}},
    {"type": "object", "properties": {"multipleOf": {"const": 999_983}}},
    {"allOf": [{"type": "number", "multipleOf": 0.01}, {"multipleOf": 25}]},
    {"type": "integer", "multipleOf": True},
])
def test_other_multiples_are_followed_or_refused_by_their_reader(model: Model, schema: dict) -> None:
    try:
        ask(model, Constraint("json_schema", json.dumps(schema)), max_new_tokens=3)
    except VL2Error as error:
        assert "remainders" not in error.message


def test_what_cannot_be_followed_is_told_on_one_line_without_the_readers_own_state(model: Model) -> None:
    for kind, text in (("json_schema", '{"$ref": "#"}'), ("regex", "a(\n" * 900)):
        with pytest.raises(VL2Error) as error:
            ask(model, Constraint(kind, text))
        assert "\n" not in error.value.message and "state>" not in error.value.message
        assert "^" not in error.value.message and len(error.value.message) < 400
    assert error.value.message.endswith("unclosed group")


@pytest.mark.parametrize("kind, text, message", [
    ("regex", "a(", "regex of the constraint cannot be used: .*unclosed group"),
    ("regex", "(?=a)b", "look-around"),
    ("json_schema", "{", "cannot be read"), ("json_schema", "[1]", "cannot be read"),
    ("json_schema", '{"type": "objekt"}', "Invalid type: objekt"),
    ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
    ("json_schema", "[" * 100_000, "cannot be read"),
])
def test_a_constraint_that_cannot_be_followed_is_refused_before_any_graph_runs(model, kind, text, message) -> None:
    model.engine.backend.runs.clear()
    with pytest.raises(VL2Error, match=re.compile(message, re.DOTALL)) as error:
        ask(model, Constraint(kind, text))
    assert error.value.hint and model.engine.backend.runs == []


@pytest.mark.parametrize("kind, text", [("regexp", "a"), ("regex", ""), ("boxes", "a"), ("json_schema", "")])
def test_a_wrong_constraint_is_refused_by_name(kind: str, text: str) -> None:
    with pytest.raises(VL2Error, match="a constraint .* expected"):
        Constraint(kind, text)


def test_ignoring_the_end_token_contradicts_a_constraint() -> None:
    with pytest.raises(VL2Error, match="ignore_eos"):
        GenerationOptions(ignore_eos=True, constraint=Constraint("boxes"))


def test_a_missing_package_is_an_error_that_says_how_to_install_it(shared_bundle: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(VL2Error, match="llguidance") as error:
        ask(numpy_model_of(shared_bundle), Constraint("boxes"))
    assert "'.[constrained]'" in error.value.hint

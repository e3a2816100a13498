"""JSON is read strictly: what Python's own reader lets pass is refused with the file's name."""

import pytest

from vl2.errors import VL2Error
from vl2.json_file import read_json


def test_an_object_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": {"b": 1}, "c": {"b": 2}}')
    assert read_json(path) == {"a": {"b": 1}, "c": {"b": 2}}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"x": [{"deep": 1, "deep": 1}]}', "'deep' occurs twice"),
        ("[1, 2]", "holds a list"),
        ('{"a": ', "cannot be read as JSON"),
    ],
)
def test_what_is_ambiguous_or_broken_is_refused_by_name(tmp_path, text, complaint):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(VL2Error, match=complaint) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(VL2Error, match="config.json is missing"):
        read_json(tmp_path / "config.json")

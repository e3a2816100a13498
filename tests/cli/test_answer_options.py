"""Options of `vl2 run` and `vl2 chat` that shape an answer or keep what was computed, on the small bundle."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tests.runtime.small_bundle import build_bundle
from vl2.cli import cli


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return build_bundle(tmp_path_factory.mktemp("bundles") / "small.bundle")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.effect_noise((60, 40), 90).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def vl2_run(bundle: Path, *options: object) -> Result:
    given = [str(option) for option in ("--prompt", "What is shown?", "--device", "cpu", *options)]
    return CliRunner().invoke(cli, ["run", str(bundle), *given])


def test_an_answer_matches_the_pattern_that_was_given(bundle: Path) -> None:
    done = vl2_run(bundle, "--regex", "(yes|no), [a-z]{3}")
    assert done.exit_code == 0 and done.stdout[:4] in ("yes,", "no, ") and len(done.stdout) in (8, 9)
    assert "warning" not in done.stderr
    cut = vl2_run(bundle, "--regex", "[a-z]{90}", "--max-new-tokens", 2)
    assert "warning: the answer was cut after 2 tokens" in cut.stderr


def test_an_answer_follows_the_schema_in_a_file(bundle: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
              "required": ["count"], "additionalProperties": False}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    done = vl2_run(bundle, "--json-schema", tmp_path / "schema.json")
    assert 0 <= json.loads(done.stdout)["count"] <= 99


def test_constrained_boxes_have_no_problems(bundle: Path) -> None:
    done = vl2_run(bundle, "--boxes", "--max-new-tokens", 30, "--json")
    answer = json.loads(done.stdout)
    assert answer["box_problems"] == [] and ("warning" in done.stderr) == (answer["stop_reason"] == "length")


def test_two_constraints_are_a_usage_error_and_a_missing_schema_names_its_file(bundle: Path) -> None:
    assert "one of --boxes, --regex and --json-schema" in vl2_run(bundle, "--boxes", "--regex", "a").stderr
    missing = vl2_run(bundle, "--json-schema", "none.json")
    assert missing.exit_code == 1 and "none.json" in str(missing.exception)


def test_a_second_run_finds_its_image_in_the_cache_folder(bundle: Path, image: Path, tmp_path: Path) -> None:
    options = ("--image", image, "--cache", tmp_path / "cache", "--cache-size", "1MB", "--json", "--max-new-tokens", 5)
    first, second = (json.loads(vl2_run(bundle, *options).stdout) for _ in range(2))
    assert [first["image_cache_hits"], second["image_cache_hits"]] == [0, 1]
    assert first["token_ids"] == second["token_ids"]


def test_logprobs_come_with_the_json(bundle: Path) -> None:
    answer = json.loads(vl2_run(bundle, "--json", "--top-logprobs", 2, "--max-new-tokens", 4).stdout)
    assert len(answer["logprobs"]) == len(answer["token_ids"])
    assert all(len(entry["top"]) == 2 and entry["logprob"] <= 0 for entry in answer["logprobs"])


def test_the_guard_is_told_on_stderr_and_can_be_switched_off(bundle: Path, monkeypatch) -> None:
    monkeypatch.setattr("vl2.runtime.sampling.Sampler.draw", lambda *_: 50)
    ended = vl2_run(bundle, "--max-new-tokens", 300, "--json")
    assert json.loads(ended.stdout)["stop_reason"] == "loop"
    assert "warning: the answer was ended, a block of 1 token is repeated" in ended.stderr
    free = vl2_run(bundle, "--max-new-tokens", 300, "--json", "--no-repetition-guard")
    assert json.loads(free.stdout)["stop_reason"] == "length" and "warning" not in free.stderr


def test_chat_takes_the_same_options(bundle: Path, image: Path, tmp_path: Path) -> None:
    given = [bundle, "--device", "cpu", "--image", image, "--regex", "[a-z]{4}", "--cache", tmp_path / "c"]
    done = CliRunner().invoke(cli, ["chat", *map(str, given)], input="What?\nAnd?\n")
    assert [len(line) for line in done.stdout.split()] == [4, 4] and any((tmp_path / "c" / "images").iterdir())


def test_logprobs_without_json_would_be_seen_by_nobody(bundle: Path) -> None:
    refused = vl2_run(bundle, "--top-logprobs", 2)
    assert refused.exit_code == 2 and "--top-logprobs needs --json" in refused.stderr


def chat_about(bundle: Path, said: bytes) -> Result:
    """A conversation in words of four letters."""
    return CliRunner().invoke(cli, ["chat", str(bundle), "--device", "cpu", "--regex", "[a-z]{4}"], input=said)


def test_a_chat_goes_on_after_a_quote_that_is_not_closed(bundle: Path) -> None:
    done = chat_about(bundle, b"/image /tmp/Bob's.png\nStill there?\n")
    assert done.exit_code == 0 and "No closing quotation" in done.stderr and len(done.stdout.split()) == 1


def test_a_chat_goes_on_after_a_byte_that_is_no_text(bundle: Path) -> None:
    done = chat_about(bundle, b"caf\xe9?\nStill there?\n")
    assert done.exit_code == 0 and "0xe9" in done.stderr and len(done.stdout.split()) == 1


def test_a_broken_image_goes_with_its_question(bundle: Path, image: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    done = chat_about(bundle, f"/image {image} {broken}\nWhat?\nStill there?\n".encode())
    assert done.exit_code == 0 and done.stderr.count("error:") == 1 and len(done.stdout.split()) == 1
    assert f"dropped with the question: {image}, {broken}" in done.stderr


def test_a_name_that_no_system_takes_is_no_file(bundle: Path) -> None:
    done = chat_about(bundle, b"/image " + b"x" * 5000 + b"\nStill there?\n")
    assert done.exit_code == 0 and "there is no file" in done.stderr and len(done.stdout.split()) == 1

"""The command line from outside: exit codes, what goes to which stream, errors without tracebacks."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest

from vl2.cli import cli, run_command
from vl2.cli.export import command as export
from vl2.cli.reference import reference
from vl2.nano.demo import ANSWER

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"


def vl2(*arguments: object, stdin: str = "", program: str = "main", env=None) -> subprocess.CompletedProcess:
    """Runs the command in a process of its own, as a shell would."""
    code = f"import sys; from vl2.cli import {program}; sys.exit({program}())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=env)


def here(capfd: pytest.CaptureFixture[str], *arguments: object, program: click.Command = cli) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a verb that needs torch, which a process of its own would import anew."""
    capfd.readouterr()
    code = run_command(program, "vl2", [str(argument) for argument in arguments])
    return code, *capfd.readouterr()


@pytest.mark.parametrize("arguments", [
    ("nonsense",), ("export", "somewhere"), ("run",), ("run", "b", "--draw", "x.png", "--prompt", "q"),
    ("export", "x", "--out", "y", "--scheme", "int3"),
])
def test_wrong_usage_exits_with_2_and_says_how_it_is_used(arguments):
    done = vl2(*arguments)
    assert done.returncode == 2 and "Usage" in done.stderr and done.stdout == ""


def test_an_error_of_the_users_world_exits_with_1_and_shows_no_traceback(tmp_path):
    done = vl2("inspect", tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "hint:" in done.stderr and "Traceback" not in done.stderr


def test_debug_shows_the_traceback(tmp_path):
    done = vl2("inspect", tmp_path, "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_the_page_of_the_command_line_is_what_help_prints():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == reference(), "renew it: python -m vl2.cli.reference > docs/cli.md"


@pytest.mark.parametrize("name, experts", [("tiny-mini", 12), ("small-mini", 16), ("base-mini", 16)])
def test_inspecting_a_checkpoint_accounts_for_every_byte(name, experts):
    facts = json.loads(vl2("inspect", GOLDENS / name, "--json").stdout)
    assert facts["kind"] == "checkpoint" and facts["experts"] == experts
    assert "other" not in facts["modules"]
    assert sum(module["size_bytes"] for module in facts["modules"].values()) == facts["size_bytes"]
    assert facts["size_bytes"] <= sum(file["size_bytes"] for file in facts["files"].values())


def test_inspecting_with_hashes_gives_the_sha256_of_each_shard():
    facts = json.loads(vl2("inspect", GOLDENS / "small-mini", "--json", "--hashes").stdout)
    for name, file in facts["files"].items():
        assert file["sha256"] == hashlib.sha256((GOLDENS / "small-mini" / name).read_bytes()).hexdigest()


def recorded(name: str, case: str) -> tuple[str, list[str], list[int]]:
    """Question, image files and the 24 token ids of a golden case."""
    golden = GOLDENS / name / "golden"
    facts = json.loads((golden / "model.json").read_text(encoding="utf-8"))["cases"][case]
    question = facts["conversation"][0]["content"]
    images = [str(GOLDENS / "images" / f"{image}.png") for image in facts["images"]]
    return question, images, np.load(golden / "generation.npz")[f"{case}/ids"][0].tolist()


@pytest.mark.parametrize("case", ["text", "one", "tiled"])
def test_running_a_bundle_gives_the_original_tokens(bundle_of, case):
    question, images, ids = recorded("tiny-mini", case)
    given = [part for image in images for part in ("--image", image)]
    done = vl2("run", bundle_of(GOLDENS / "tiny-mini"), *given, "--prompt", question, "--ignore-eos",
               "--max-new-tokens", "24", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["token_ids"] == ids and answer["stop_reason"] == "length"
    for key in ("text", "prompt_tokens", "boxes", "encode_ms", "prefill_ms", "decode_ms", "tokens_per_second",
                "peak_rss_bytes"):
        assert key in answer


def test_the_streamed_text_is_the_text_of_the_json(bundle_of):
    bundle, options = bundle_of(GOLDENS / "tiny-mini"), ("--prompt", "Hello", "--max-new-tokens", "12")
    text = json.loads(vl2("run", bundle, *options, "--json").stdout)["text"]
    assert vl2("run", bundle, *options).stdout == text + "\n"


def test_a_count_of_images_that_does_not_match_the_prompt_is_an_error(bundle_of):
    done = vl2("run", bundle_of(GOLDENS / "tiny-mini"), "--prompt", "<image> and <image>", "--image",
               GOLDENS / "images" / "sq_384x384.png")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "image" in done.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(capfd, tmp_path):
    code, told, talk = here(capfd, GOLDENS / "tiny-mini", "--out", tmp_path / "bundle", "--dry-run", "--json",
                            program=export)
    assert code == 0, talk
    assert json.loads(told) and list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_not_replaced_without_force(capfd, bundle_of):
    bundle = bundle_of(GOLDENS / "tiny-mini")
    before = (bundle / "manifest.json").read_bytes()
    code, _, talk = here(capfd, GOLDENS / "tiny-mini", "--out", bundle, program=export)
    assert code == 1 and "--force" in talk
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_hub_id_without_network_names_the_folder_form(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = vl2("deepseek-ai/deepseek-vl2-tiny", "--out", tmp_path / "b", program="export_main", env=environment)
    assert done.returncode == 1 and "folder" in done.stderr and "Traceback" not in done.stderr


def test_inspecting_a_bundle_lists_graphs_ports_and_hashes(bundle_of):
    facts = json.loads(vl2("inspect", bundle_of(GOLDENS / "small-mini"), "--json").stdout)
    assert facts["kind"] == "bundle" and facts["language"]["attention"] == "mla"
    assert {port["name"] for port in facts["graphs"]["decoder"]["inputs"]} >= {"inputs_embeds", "past_latent.0"}
    assert all(len(file["sha256"]) == 64 for file in facts["files"].values())
    assert "past_latent.0" in vl2("inspect", bundle_of(GOLDENS / "small-mini")).stdout


def test_chat_answers_each_line_and_goes_on_after_an_error(bundle_of, tmp_path):
    lines = "Hello\n/image missing.png\n/nonsense\nAnd now?\n/reset\nHello\n/quit\nnever read\n"
    done = vl2("chat", bundle_of(GOLDENS / "tiny-mini"), "--max-new-tokens", "6", stdin=lines)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.split("\n")
    assert done.stderr.count("error: ") == 2 and "missing.png" in done.stderr
    assert answers[0] == answers[-2], "after /reset the first question is answered as at first"


def test_the_demo_gives_the_right_answer_and_says_where_the_bundle_is(capfd, tmp_path):
    code, told, talk = here(capfd, "demo", "--out", tmp_path / "nano.bundle")
    assert code == 0, talk
    answer, place = told.splitlines()
    assert answer == ANSWER and place == f"bundle: {(tmp_path / 'nano.bundle').resolve()}"

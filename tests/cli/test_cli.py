"""The command line from outside: exit codes, what goes to which stream, errors without tracebacks."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vl2.cli.reference import reference

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"


def vl2(*arguments: object, stdin: str = "", program: str = "main") -> subprocess.CompletedProcess:
    """Runs the command in a process of its own, as a shell would."""
    code = f"import sys; from vl2.cli import {program}; sys.exit({program}())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True)


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

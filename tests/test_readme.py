"""The README's commands do what it says, run one after the other as a reader would."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vl2.cli import run_command
from vl2.cli.export import command as export

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


# Run by a shell; other exports by the same function in this process, which has imported torch and has traces.
EXPORT_IN_A_SHELL = "vl2-export nano/checkpoint --out nano.bundle"


def run(command: str, capfd: pytest.CaptureFixture[str]) -> str:
    """stdout of a command."""
    if command.startswith("vl2-export ") and command != EXPORT_IN_A_SHELL:
        capfd.readouterr()
        code = run_command(export, "vl2-export", shlex.split(command)[1:])
        told, talk = capfd.readouterr()
    else:
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
        code, told, talk = done.returncode, done.stdout, done.stderr
    assert code == 0, f"{command}\n{talk}"
    return told


def test_the_commands_of_the_readme_run_in_order(tmp_path, monkeypatch, capfd):
    (tmp_path / "nano").symlink_to(ROOT / "nano")
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("sh") for line in block.splitlines() if line]
    assert len(commands) >= 5 and EXPORT_IN_A_SHELL in commands
    outputs = {command: run(command, capfd) for command in commands}
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert (report["reference"]["scheme"], report["candidate"]["scheme"]) == ("fp16", "int4")
    assert report["bounds"][0]["holds"] and report["tasks"] and (tmp_path / "report" / "report.html").is_file()
    answer = json.loads(next(text for command, text in outputs.items() if command.endswith("--json")))
    plain = next(text for command, text in outputs.items() if command.startswith("vl2 run") and "--json" not in command)
    assert plain.strip() == answer["text"]
    for code in blocks("python"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert answer["text"] in done.stdout


def test_make_demo_and_make_test_are_what_the_readme_says():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "make demo" in README and "make test" in README
    assert re.search(r"^demo:.*\n\t\$\(VENV\)/bin/vl2 demo$", makefile, flags=re.M)
    assert {"make test ", "make test-thorough "} <= set(re.findall("make [a-z-]+ ", (ROOT / ".ci" / "run").read_text()))


def test_every_link_of_the_documents_leads_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

"""The README's commands do what it says, run one after the other as a reader would."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_the_commands_of_the_readme_run_in_order(tmp_path):
    (tmp_path / "nano").symlink_to(ROOT / "nano")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    commands = [line for block in blocks("sh") for line in block.splitlines() if line]
    assert len(commands) >= 5
    outputs = {}
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        outputs[command] = done.stdout
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert (report["reference"]["scheme"], report["candidate"]["scheme"]) == ("fp16", "int4")
    assert report["bounds"][0]["holds"] and report["tasks"] and (tmp_path / "report" / "report.html").is_file()
    answer = json.loads(next(text for command, text in outputs.items() if command.endswith("--json")))
    plain = next(text for command, text in outputs.items() if command.startswith("vl2 run") and "--json" not in command)
    assert plain.strip() == answer["text"]
    for code in blocks("python"):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert answer["text"] in done.stdout


def test_make_demo_and_make_test_are_what_the_readme_says():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "make demo" in README and "make test" in README
    assert re.search(r"^demo:.*\n\t\$\(VENV\)/bin/vl2 demo$", makefile, flags=re.M)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_link_of_the_documents_leads_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

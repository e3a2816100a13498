"""The Python of docs/answers.md does what the page says."""

import contextlib
import io
import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_pages_example_runs(nano_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    page = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")
    code, = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    os.symlink(nano_bundle, tmp_path / "nano.bundle")
    shutil.copy(ROOT / "nano" / "demo.png", tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    free, constrained = said.getvalue().splitlines()
    assert free.endswith("eos 0") and re.match(r"\d{1,4}\.\d{2} 1 \[-", constrained)
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 1

"""The oldest Python that pyproject.toml promises: Jetson's JetPack 6 has 3.10."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = "vl2 runtime accuracy model calib quant plugins layerwise export nano examples".split()


def test_no_file_uses_what_came_after_python_3_10() -> None:
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()
    command = [Path(sys.executable).with_name("vermin"), "-t=3.10-", "--violations", "--no-tips", *FOLDERS]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr

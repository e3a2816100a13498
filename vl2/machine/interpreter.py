"""Trying things in a Python of its own: what crashes or hangs there is an answer, not the end of `vl2 doctor`."""

from __future__ import annotations

import subprocess
import sys

_TIMEOUT_S = 120


def attempt(code: str, timeout_s: float = _TIMEOUT_S) -> tuple[str | None, str]:
    """(what `code` printed last, "") when it ran, or (None, the last line of its error)."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {timeout_s:.0f} s"
    if done.returncode == 0:
        return _last_line(done.stdout), ""
    return None, _last_line(done.stderr) or f"the process ended with code {done.returncode}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""

"""One check of `vl2 doctor`: what was tried, how it went, and the command that mends it."""

from __future__ import annotations

from dataclasses import dataclass

OK, MISSING, FAILED = "ok", "missing", "failed"


@dataclass(frozen=True)
class Check:
    """status: ok; missing: not here and not needed to run a bundle; failed: should work and does not.

    required: a bundle cannot be run without it. mend: a command, or what to do where none does it.
    """

    area: str
    name: str
    status: str
    detail: str
    mend: str | None = None
    required: bool = False


def able(checks: list[Check]) -> bool:
    """Whether this installation can run a bundle."""
    return all(check.status == OK for check in checks if check.required)

"""Bearer tokens: from a file or the environment, never from the command line, which everybody on a machine can read."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vl2.errors import VL2Error

VARIABLE = "VL2_SERVE_TOKEN"
_LEAST = 16
_ALLOWED = re.compile(r"[!-~]+")
_REMEDY = "make one with: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"


def read_tokens(path: Path | None) -> tuple[str, ...]:
    """The tokens of a file, one a line, or the one of VL2_SERVE_TOKEN, which is taken out of the environment.

    Raises VL2Error for a file that cannot be read or that other users can read, for none and for weak tokens, and when
    both are given.
    """
    variable = os.environ.pop(VARIABLE, None)
    if path is None:
        return () if variable is None else _checked([variable], VARIABLE)
    if variable is not None:
        raise VL2Error(f"{VARIABLE} and --token-file are both given", "give one of them")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        shared = path.stat().st_mode & 0o077
    except (OSError, UnicodeError) as error:
        raise VL2Error(f"the token file {path} cannot be read: {error}", "give a text file") from error
    if shared:
        raise VL2Error(f"other users can open the token file {path} (mode {path.stat().st_mode & 0o777:03o})",
                       f"chmod 600 {path}")
    return _checked([line.strip() for line in lines if line.strip()], str(path))


def _checked(tokens: list[str], source: str) -> tuple[str, ...]:
    if not tokens:
        raise VL2Error(f"{source} holds no token", _REMEDY)
    for number, token in enumerate(tokens, 1):
        # The token itself is not told.
        if len(token) < _LEAST or not _ALLOWED.fullmatch(token):
            raise VL2Error(f"token {number} of {source} has {len(token)} characters or some that no header may hold, "
                           f"expected {_LEAST} or more of printable ASCII without spaces", _REMEDY)
    return tuple(tokens)

"""Fixtures for the whole suite. Imports no torch: the runtime's tests run where it is absent."""

from __future__ import annotations

from pathlib import Path

import pytest

GOLDENS = Path(__file__).parent / "goldens"
MINI_CHECKPOINTS = ("tiny-mini", "small-mini", "base-mini")


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The recorded data of the original implementation; its README tells the layout."""
    return GOLDENS


@pytest.fixture(scope="session", params=MINI_CHECKPOINTS)
def mini_folder(request: pytest.FixtureRequest) -> Path:
    """Each miniature checkpoint in turn."""
    return GOLDENS / request.param

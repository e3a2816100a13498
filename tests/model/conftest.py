from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.recorded import Mini, load_mini


@pytest.fixture(scope="session")
def mini(mini_folder: Path) -> Mini:
    """Each miniature checkpoint in turn: the model and what the original computed with the same weights."""
    return load_mini(mini_folder)

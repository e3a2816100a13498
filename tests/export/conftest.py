"""Exports of these tests begin sooner."""

import pytest

from tests.conftest import keep_translations


@pytest.fixture(scope="session", autouse=True)
def _translations_kept() -> None:
    keep_translations()

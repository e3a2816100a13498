"""A table of a report, and how its numbers are written."""

from __future__ import annotations

from dataclasses import dataclass

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """title; header; rows of texts; note: what the reader must know, may be empty."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def number(value: float | None) -> str:
    """Three significant digits."""
    return NOTHING if value is None else f"{value:.3g}"


def with_error(value: float, error: float | None, unit: str = "", digits: int = 4) -> str:
    """value ± error, or the value alone where the error is not known."""
    return f"{value:.{digits}g}{unit}" + ("" if error is None else f" ± {error:.2g}{unit}")

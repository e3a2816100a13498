"""Progress on stderr: a bar for long byte streams, a line for long computations."""

import sys
import time
from typing import Any

import click
from tqdm import tqdm

# Less is done before a bar could be read.
_WORTH_SHOWING_BYTES = 100_000_000


class ByteProgress:
    """Callable `(stage, done_bytes, total_bytes)`: a bar a stage, none for small ones or without a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage: str | None = None

    def __enter__(self) -> "ByteProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        if stage != self._stage:
            self.__exit__()
            self._stage = stage
            shown = total_bytes >= _WORTH_SHOWING_BYTES and sys.stderr.isatty()
            self._bar = tqdm(total=total_bytes, desc=stage, unit="B", unit_scale=True, disable=not shown)
        self._bar.update(done_bytes - self._bar.n)


class WorkProgress:
    """Callable with calibration's `Progress`: how far the work is and how long it will take.

    On a terminal one line that is rewritten; elsewhere a line every half minute.
    """

    def __init__(self) -> None:
        self._told = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self._width = 0

    def __enter__(self) -> "WorkProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._width:
            click.echo(err=True)

    def __call__(self, progress: Any) -> None:
        self.tell(progress.stage, progress.done / max(progress.total, 1e-9), progress.remaining_seconds)

    def tell(self, stage: str, share: float, remaining_seconds: float | None = None) -> None:
        """share: of the whole work, 0 to 1."""
        now = time.monotonic()
        if now - self._told < (0.2 if self._on_terminal else 30):
            return
        self._told = now
        line = f"{stage}, {share:.0%}" + ("" if remaining_seconds is None else f", {_time(remaining_seconds)} left")
        if self._on_terminal:
            click.echo(f"\r{line.ljust(self._width)}", err=True, nl=False)
            self._width = len(line)
        else:
            click.echo(line, err=True)


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"

"""Progress on stderr: a bar for long byte streams, a line for long computations."""

import sys
import time
from typing import Any

import click
from tqdm import tqdm

# Less is done before a bar could be read.
_WORTH_SHOWING_BYTES = 100_000_000
# What the parity run does next; minutes each for a full-size model, and no bytes to count.
_VERIFYING = ("the vision tower in both", "the decoder's graph", "the decoder in PyTorch")


class ByteProgress:
    """Callable `(stage, done_bytes, total_bytes)`: a bar a stage, none for small ones or without a terminal; of the
    stage "verify", which counts its parts, a line a part."""

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
        if stage == "verify" and done_bytes < len(_VERIFYING):
            click.echo(f"verifying, {done_bytes + 1} of {total_bytes}: {_VERIFYING[done_bytes]}", err=True)
        self._bar.update(done_bytes - self._bar.n)


class WorkProgress:
    """Callable with calibration's `Progress`: how far the work is and how long it will take.

    On a terminal one line that is rewritten; elsewhere a line every half minute. later: how long the steps that follow
    this one take, in durations of this one.
    """

    def __init__(self, later: float = 0.0) -> None:
        self._later = later
        self._first: tuple[float, float] | None = None
        self._last: tuple[float, float | None] = (0.0, None)
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

    def tell(self, stage: str, share: float | None, remaining_seconds: float | None = None) -> None:
        """share: of the whole work, 0 to 1, None for a part of what was told last; remaining_seconds: None for the rate
        of the shares told so far."""
        now = time.monotonic()
        if share is None:
            share, remaining_seconds = self._last
        elif self._first is None or share < self._last[0]:  # another scale begins
            self._first = share, now
        elif remaining_seconds is None and share > self._first[0]:
            remaining_seconds = (now - self._first[1]) / (share - self._first[0]) * (1 - share)
        self._last = share, remaining_seconds
        if now - self._told < (0.2 if self._on_terminal else 30):
            return
        self._told = now
        line = f"{stage}, {share:.0%}" + ("" if remaining_seconds is None else self._left(share, remaining_seconds))
        if self._on_terminal:
            click.echo(f"\r{line.ljust(self._width)}", err=True, nl=False)
            self._width = len(line)
        else:
            click.echo(line, err=True)

    def _left(self, share: float, seconds: float) -> str:
        told = f", {format_time(seconds)} left"
        if not self._later or share >= 1:
            return told
        return f"{told}, {format_time(seconds + self._later * seconds / (1 - share))} with the steps that follow"


def format_time(seconds: float) -> str:
    """Minutes from two on, else seconds."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"

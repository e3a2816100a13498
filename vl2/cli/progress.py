"""A progress bar on stderr for long byte streams."""

import sys

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

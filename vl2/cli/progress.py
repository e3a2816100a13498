"""A progress bar on stderr for long byte streams."""

import sys

from tqdm import tqdm


class ByteProgress:
    """Callable `(stage, done_bytes, total_bytes)` that draws one bar a stage; silent when stderr is no terminal."""

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
            self._bar = tqdm(total=total_bytes, desc=stage, unit="B", unit_scale=True, file=sys.stderr,
                             disable=not sys.stderr.isatty(), leave=True)
            if not sys.stderr.isatty():
                print(f"{stage} …", file=sys.stderr)
        self._bar.update(done_bytes - self._bar.n)

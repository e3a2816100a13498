"""What a user can choose when opening a bundle and when generating."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from vl2.backends import AUTO, BACKENDS, DEVICES
from vl2.errors import VL2Error
from vl2.file_hashes import Progress
from vl2.runtime.constraints import Constraint


@dataclass(frozen=True)
class BundleOptions:
    """How a bundle is opened.

    backend: "auto" takes the fastest of `vl2.backends.BACKENDS` that works here for this bundle; one that is named is
    taken, or opening fails. device: "cpu" is short for the backend ort-cpu, "cuda" for ort-cuda. cuda_graph: engines
    replay a decode step as a whole; False launches its kernels one by one. threads: of a CPU, None is one a physical
    core that this process may use. check_hashes: False checks sizes only. check_memory: False opens a bundle
    whose weights are larger than the available memory. progress: gets (stage, bytes done, bytes in all).
    max_tiles: at most so many local tiles an image (its global view comes on top); None is the original's rule.
    kv_cache_bytes: of conversations that `Model.complete` may keep to go on with; a running one comes on top.
    image_cache_bytes: of encoded images in memory, 10 MB for a large one of Tiny. cache_dir: keeps them there too, at
    most cache_dir_bytes; it may be shared by processes and bundles.
    """

    device: str = AUTO
    backend: str = AUTO
    cuda_graph: bool = True
    threads: int | None = None
    check_hashes: bool = True
    check_memory: bool = True
    progress: Progress | None = None
    max_tiles: int | None = None
    kv_cache_bytes: int = 512 << 20
    image_cache_bytes: int = 64 << 20
    cache_dir: str | os.PathLike | None = None
    cache_dir_bytes: int = 1 << 30

    @property
    def wanted(self) -> str:
        """One of BACKENDS, or AUTO."""
        return DEVICES[self.device] if self.backend == AUTO else self.backend

    def __post_init__(self):
        _expect(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
        names = (AUTO, *BACKENDS)
        _expect(self.backend in names, "backend", self.backend, f"one of {', '.join(names)}")
        if AUTO not in (self.device, self.backend) and DEVICES[self.device] != self.backend:
            raise VL2Error(f"the device {self.device} and the backend {self.backend} were asked for, and "
                           f"{self.device} is {DEVICES[self.device]}", "give one of the two")
        _expect(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1")
        _expect(self.max_tiles is None or self.max_tiles >= 1, "max_tiles", self.max_tiles, "at least 1")
        for name in ("kv_cache_bytes", "image_cache_bytes", "cache_dir_bytes"):
            _expect(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated; the defaults are greedy, as the original's README examples.

    The original's inference.py samples with temperature 0.4, top_p 0.9, repetition_penalty 1.1.
    repetition_penalty: over prompt and answer. stop: the answer ends before the first of these strings.
    seed: None draws another one each time. ignore_eos: goes on after the end token, for measurements; the repetition
    guard is then off. prefill_chunk: prompt tokens taken at once; less needs less memory.
    frequency_penalty, presence_penalty: taken from the logit of a token for each time it is in the answer, and once.
    top_logprobs: how many of the likeliest tokens come with each token's logprob; None gives no logprobs.
    constraint: what the answer must match. repetition_guard: ends an answer that goes round in circles
    (vl2.runtime.repetition has the rule).
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    prefill_chunk: int = 512
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    top_logprobs: int | None = None
    constraint: Constraint | None = None
    repetition_guard: bool = True

    def __post_init__(self):
        _expect(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _expect(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 (greedy) or more")
        _expect(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, at most 1")
        _expect(0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "more than 0")
        _expect(not isinstance(self.stop, str), "stop", self.stop, "a tuple of strings")
        _expect(all(self.stop), "stop", self.stop, "strings that are not empty")
        _expect(self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more")
        _expect(self.prefill_chunk >= 1, "prefill_chunk", self.prefill_chunk, "at least 1")
        for name in ("frequency_penalty", "presence_penalty"):
            _expect(math.isfinite(getattr(self, name)), name, getattr(self, name), "a finite number")
        _expect(self.top_logprobs is None or self.top_logprobs >= 0, "top_logprobs", self.top_logprobs, "0 or more")
        if self.ignore_eos and self.constraint is not None:
            raise VL2Error("ignore_eos goes on after the end token, a constraint ends there", "give one of them")


def _expect(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise VL2Error(f"{name} is {value!r}, expected {expected}")

"""What Prometheus is told. One registry a server, so that several in one process do not add up."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from vl2.runtime import Answer

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RATES = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counts of one server; the process's memory is `process_resident_memory_bytes`."""

    def __init__(self):
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter("vl2_requests", "Requests by status; 499: the client left.", ["path", "status"],
                                 registry=registry)
        self._waiting = Gauge("vl2_queue_length", "Requests that wait for the model.", registry=registry)
        self._running = Gauge("vl2_running", "Requests that are being answered.", registry=registry)
        self._prompt = Counter("vl2_prompt_tokens", "Prompt tokens of finished answers.", registry=registry)
        self._reused = Counter("vl2_reused_tokens", "Prompt tokens that were in a cache.", registry=registry)
        self._answer = Counter("vl2_answer_tokens", "Tokens of finished answers.", registry=registry)
        self._hits = Counter("vl2_image_cache_hits", "Images that needed no run of the vision graph.",
                             registry=registry)
        self._first = Histogram("vl2_time_to_first_token_seconds", "From arrival, time in the queue included.",
                                buckets=_SECONDS, registry=registry)
        self._rate = Histogram("vl2_decode_tokens_per_second", "Of each finished answer.", buckets=_RATES,
                               registry=registry)

    def watch_queue(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Takes both gauges from functions, when they are asked for."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)

    def request(self, path: str, status: int) -> None:
        """Counts one request."""
        self._requests.labels(path, status).inc()

    def first_token(self, seconds: float) -> None:
        """Counts the time one client waited for the first piece of text."""
        self._first.observe(seconds)

    def answered(self, answer: Answer) -> None:
        """Counts a finished answer."""
        self._prompt.inc(answer.prompt_tokens)
        self._reused.inc(answer.reused_tokens)
        self._answer.inc(len(answer.token_ids))
        self._hits.inc(answer.image_cache_hits)
        if answer.tokens_per_second is not None:
            self._rate.observe(answer.tokens_per_second)

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)

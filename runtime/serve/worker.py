"""The one thread that owns the model: takes jobs in turn, answers them, ends them when nobody wants them any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from vl2.errors import VL2Error
from vl2.prompt import Message
from vl2.runtime import Answer, AnswerStream, GenerationOptions, Model
from vl2.runtime.serve.api_error import ApiError, internal_error, refused
from vl2.runtime.serve.channel import Channel
from vl2.runtime.serve.fair_queue import FairQueue, QueueClosed, QueueFull
from vl2.runtime.serve.images import decode
from vl2.runtime.serve.metrics import Metrics
from vl2.runtime.serve.request import Turn
from vl2.runtime.serve.settings import Limits

Outcome = Answer | ApiError
# Least and most that a refused client is told to wait.
_RETRY_SECONDS = (1, 60)


class _Ended(Exception):
    """The job was ended from outside; `Job.ended` says why."""


@dataclass(eq=False)
class Job:
    """One request on its way. name: in log and answers. images: encoded, in the order of the turns."""

    name: str
    client: str
    turns: Sequence[Turn]
    images: Sequence[bytes]
    options: GenerationOptions
    channel: Channel[Outcome]
    arrived: float = field(default_factory=time.monotonic)
    ended: ApiError | None = None
    stream: AnswerStream | None = None
    closing: threading.Lock = field(default_factory=threading.Lock)

    def end(self, why: ApiError) -> None:
        """Ends the job at the next token, from any thread; the first reason stays."""
        with self.closing:
            if self.ended is None:
                self.ended = why
            if self.stream is not None:
                self.stream.close()
        self.channel.finish(self.ended)


class Worker:
    """Runs jobs one at a time in a thread of its own."""

    def __init__(self, model: Model, limits: Limits, metrics: Metrics):
        self._model, self._metrics = model, metrics
        self._queue: FairQueue[Job] = FairQueue(limits.queued, limits.queued_per_client)
        self._thread = threading.Thread(target=self._run, name="vl2-model", daemon=True)
        self._current: Job | None = None
        self._usual_seconds = 5.0
        metrics.watch_queue(self.waiting, self.running)

    def start(self) -> None:
        """Begins to take jobs."""
        self._thread.start()

    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._queue)

    def running(self) -> int:
        """1 while a job is answered."""
        return int(self._current is not None)

    def submit(self, job: Job) -> None:
        """Queues a job. Raises ApiError 429 with the time after which to come again, 503 at the end."""
        try:
            self._queue.put(job.client, job)
        except QueueClosed as error:
            raise _shutting_down() from error
        except QueueFull as error:
            least, most = _RETRY_SECONDS
            seconds = round(min(most, max(least, self._usual_seconds * (1 + self.waiting()))))
            raise ApiError(429, str(error), code="queue_full", retry_after=seconds) from error

    def drop(self, job: Job, why: ApiError) -> None:
        """Ends a job wherever it is; one that waits leaves the queue at once."""
        self._queue.remove(job.client, job)
        job.end(why)

    def close_queue(self) -> None:
        """Takes no more jobs and ends those that wait; the running one goes on."""
        for job in self._queue.close():
            job.end(_shutting_down())

    def stop(self, seconds: float) -> None:
        """Ends all jobs and waits so long for the thread."""
        self.close_queue()
        if (job := self._current) is not None:
            job.end(_shutting_down())
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        while (job := self._queue.take()) is not None:
            self._current = job
            started = time.monotonic()
            outcome = self._outcome(job)
            with job.closing:
                pass  # whoever closes the stream right now hands the context back; only then may the next job begin
            job.channel.finish(outcome)
            self._current = None
            self._usual_seconds += 0.2 * (time.monotonic() - started - self._usual_seconds)

    def _outcome(self, job: Job) -> Outcome:
        if job.ended is not None:
            return job.ended
        try:
            return self._answer(job)
        except Exception as error:
            # Ended from outside, the stream says so by an error of its own; that is no defect.
            if job.ended is not None:
                return job.ended
            if isinstance(error, ApiError):
                return error.anew()
            if isinstance(error, VL2Error) and job.options.constraint and error.message.startswith("the constraint"):
                # Found out while answering: a constraint that is too large for its library's limits.
                return refused(error)
            return internal_error(job.name)

    def _answer(self, job: Job) -> Answer:
        messages = _messages(job)
        try:
            job.stream = self._model.complete(messages, job.options)
        except VL2Error as error:
            raise refused(error, "messages") from error
        if job.ended is not None:
            raise _Ended
        first = True
        for piece in job.stream:
            if first:
                self._metrics.first_token(time.monotonic() - job.arrived)
                first = False
            if not job.channel.put(piece):
                job.end(ApiError(503, "the client does not read its answer"))
        if job.ended is not None:
            raise _Ended
        self._metrics.answered(job.stream.answer)
        return job.stream.answer


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down")


def _messages(job: Job) -> list[Message]:
    """Decoded here, not on arrival: what waits in the queue takes its encoded size only."""
    encoded = iter(job.images)
    return [Message(turn.role, turn.content, tuple(decode(next(encoded)) for _ in turn.images)) for turn in job.turns]

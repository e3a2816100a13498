"""The one thread that owns the model: takes jobs in turn, answers some together, ends those that nobody wants."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from vl2.errors import VL2Error
from vl2.prompt import Message
from vl2.runtime import Answer, AnswerStream, GenerationOptions, Model
from vl2.runtime.engine import Step, run_steps
from vl2.runtime.serve.api_error import ApiError, internal_error, refused, shutting_down
from vl2.runtime.serve.channel import Channel
from vl2.runtime.serve.fair_queue import FairQueue, QueueClosed, QueueFull
from vl2.runtime.serve.images import Encoded
from vl2.runtime.serve.metrics import Metrics
from vl2.runtime.serve.request import Turn
from vl2.runtime.serve.settings import Limits

Outcome = Answer | ApiError
# Least and most that a refused client is told to wait.
_RETRY_SECONDS = (1, 60)
# Pillow holds four of a pixel: as it is stored, and once more as RGB.
_PIXEL_BYTES = 8


class _Ended(Exception):
    """The job was ended from outside; `Job.ended` says why."""


@dataclass(eq=False)
class Job:
    """One request on its way. name: in log and answers. images: encoded, in the order of the turns; pixels: of all."""

    name: str
    client: str
    turns: Sequence[Turn]
    images: Sequence[bytes]
    options: GenerationOptions
    channel: Channel[Outcome]
    pixels: int = 0
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
                self.stream.cancel()
        self.channel.finish(self.ended)


class _Running:
    """A job whose answer has begun. step: what it waits for."""

    def __init__(self, job: Job, stream: AnswerStream):
        self.job, self.stream, self.began = job, stream, time.monotonic()
        self.step: Step | None = None
        self.spoke = False


class Worker:
    """Runs jobs in a thread of its own, up to `batch` of them at once: a decode step takes all of them one token on.

    A job is prepared beside (images, constraint), its prompt is computed between the steps of those that run; both get
    half of the time each. batch: at most what the model takes, of which each answer is the one that it would be alone.
    """

    def __init__(self, model: Model, limits: Limits, metrics: Metrics, batch: int = 1):
        self._model, self._metrics = model, metrics
        self._batch = min(batch, model.largest_batch)
        self._queue: FairQueue[Job] = FairQueue(limits.queued, limits.queued_per_client)
        self._thread = threading.Thread(target=self._run, name="vl2-model", daemon=True)
        self._preparer = ThreadPoolExecutor(1, "vl2-prepare")
        self._running: list[_Running] = []
        self._beginning: Job | None = None
        self._held: Job | None = None  # for which there was no memory beside the others
        self._usual_seconds = 5.0
        metrics.watch_queue(self.waiting, self.running)

    def start(self) -> None:
        """Begins to take jobs."""
        self._thread.start()

    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._queue) + (self._held is not None)

    def running(self) -> int:
        """Jobs that are being answered."""
        return len(self._running) + (self._beginning is not None)

    def submit(self, job: Job) -> None:
        """Queues a job. Raises ApiError 429 with the time after which to come again, 503 at the end."""
        try:
            self._queue.put(job.client, job)
        except QueueClosed as error:
            raise shutting_down() from error
        except QueueFull as error:
            least, most = _RETRY_SECONDS
            seconds = round(min(most, max(least, self._usual_seconds * (1 + self.waiting() / self._batch))))
            raise ApiError(429, str(error), code="queue_full", retry_after=seconds) from error

    def drop(self, job: Job, why: ApiError) -> None:
        """Ends a job wherever it is; one that waits leaves the queue at once."""
        self._queue.remove(job.client, job)
        job.end(why)

    def close_queue(self) -> None:
        """Takes no more jobs and ends those that wait; the running ones go on."""
        for job in [*self._queue.close(), *filter(None, [self._held])]:
            job.end(shutting_down())

    def end_all(self) -> None:
        """Takes no more jobs and ends all that wait or run, from any thread."""
        self.close_queue()
        # In the order in which a job moves on, so that none slips through.
        for job in [*filter(None, [self._beginning]), *(run.job for run in list(self._running))]:
            job.end(shutting_down())

    def stop(self, seconds: float) -> None:
        """Ends all jobs and waits so long for the thread."""
        self.end_all()
        if self._thread.is_alive():
            self._thread.join(seconds)
        self._preparer.shutdown(wait=False)

    def _run(self) -> None:
        while self._take_job() or self._running:
            self._step()

    def _take_job(self) -> bool:
        """Takes the next job as far as there is memory beside the others; waits where none runs. False: none was there.
        """
        if self._held is None and len(self._running) < self._batch:
            self._held = self._queue.take(wait=not self._running)
        job = self._held
        if job is None:
            return False
        try:
            if job.stream is None and self._fits(job):
                self._open(job)
            if job.stream is not None and self._fits(job):
                self._begin(job)
        except Exception as error:
            self._held = None
            job.channel.finish(_why(job, error))
        self._beginning = None
        return True

    def _fits(self, job: Job) -> bool:
        """Whether a job may run beside the others, or go on to its end; before it is opened, whether its images may be
        decoded."""
        if not self._running or job.ended is not None:
            return True
        streams = [run.stream for run in self._running]
        if job.stream is None:
            return self._model.has_room(streams, job.pixels * _PIXEL_BYTES)
        return self._model.has_room([*streams, job.stream])

    def _open(self, job: Job) -> None:
        """Gives a job the stream of its answer, of which nothing is computed yet."""
        self._beginning, self._held = job, None
        if job.ended is None:
            job.stream = self._prepared(job)
        if job.ended is not None:
            raise _Ended
        self._held = job

    def _prepared(self, job: Job) -> AnswerStream:
        """The job's stream; while another thread decodes its images and reads its constraint, those that run go on."""
        if not self._running:
            return self._prepare(job)
        stream = self._preparer.submit(self._prepare, job)
        while not stream.done() and self._others_step():
            pass
        return stream.result()

    def _prepare(self, job: Job) -> AnswerStream:
        try:
            return self._model.complete(_messages(job), job.options)
        except VL2Error as error:
            raise refused(error, "messages") from error

    def _begin(self, job: Job) -> None:
        """Computes a job's prompt, with steps of the others in between."""
        self._beginning, self._held = job, None
        run = _Running(job, job.stream)
        run.stream.pause_with(_Turns(self._others_step).give)
        self._advance(run)
        if run.step is not None:
            self._running.append(run)

    def _others_step(self) -> bool:
        """A step of the jobs that run, if any do."""
        self._step()
        return bool(self._running)

    def _step(self) -> None:
        """Takes every running job one token on, all of them together."""
        for run in [run for run in self._running if run.job.ended is not None]:
            run.stream.close()
            self._finish(run, run.job.ended)
        runs = list(self._running)
        if not runs:
            return
        try:
            given = run_steps([run.step for run in runs])
        except Exception as error:  # each job ends with it
            given = [error] * len(runs)
        for run, logits in zip(runs, given, strict=True):
            self._advance(run, logits)

    def _advance(self, run: _Running, given: np.ndarray | Exception | None = None) -> None:
        """Hands a job the logits that it waits for, and its text to the client, up to the next step or its end."""
        run.step = None
        try:
            found = run.stream.resume(given)
            while isinstance(found, str):
                self._speak(run, found)
                found = run.stream.resume()
            run.step = found
        except StopIteration:
            if run.job.ended is None:
                self._metrics.answered(run.stream.answer)
            self._finish(run, run.job.ended or run.stream.answer)
        except Exception as error:
            self._finish(run, _why(run.job, error))

    def _speak(self, run: _Running, piece: str) -> None:
        if not run.spoke:
            self._metrics.first_token(time.monotonic() - run.job.arrived)
            run.spoke = True
        if not run.job.channel.put(piece):
            run.job.end(ApiError(503, "the client does not read its answer"))

    def _finish(self, run: _Running, outcome: Outcome) -> None:
        if run in self._running:
            self._running.remove(run)
        self._usual_seconds += 0.2 * (time.monotonic() - run.began - self._usual_seconds)
        run.job.channel.finish(outcome)


class _Turns:
    """Between the parts of one job's prompt: a step of the others, and more until they have had as much time."""

    def __init__(self, step: Callable[[], bool]):
        self._step, self._began, self._others = step, time.monotonic(), 0.0

    def give(self) -> None:
        """Runs steps until both have had as much, or nobody else runs."""
        others_behind = True
        while others_behind:
            start = time.monotonic()
            if not self._step():
                return
            self._others += time.monotonic() - start
            others_behind = self._others < time.monotonic() - self._began - self._others


def _why(job: Job, error: Exception) -> Outcome:
    """What a job ends with; to be called while the error is handled."""
    # Ended from outside, the stream says so by an error of its own; that is no defect.
    if job.ended is not None:
        return job.ended
    if isinstance(error, ApiError):
        return error.anew()
    if isinstance(error, VL2Error) and job.options.constraint and error.message.startswith("the constraint"):
        # Found out while answering: a constraint that is too large for its library's limits.
        return refused(error)
    return internal_error(job.name)


def _messages(job: Job) -> list[Message]:
    """Decoded here, not on arrival: what waits in the queue takes its encoded size only."""
    encoded, messages = list(job.images), []
    for turn in job.turns:
        count = len(turn.images)
        messages.append(Message(turn.role, turn.content, Encoded(encoded[:count])))
        encoded = encoded[count:]
    return messages

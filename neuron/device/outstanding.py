"""Outstanding work of a device worker: jobs that wait for an answer, and sinks of running sequences.

Independent of processes and restarts. Numbers of jobs and sequences are never used twice, so messages of an earlier
process match no request.
"""

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import Callable

from cortex.wire.errors import ApiError, RemoteError
from neuron.device import jobs

Item = jobs.TokenRow | jobs.Embedding | ApiError
Sink = Callable[[Item], None]
"""Receiver of a sequence's output: rows or an embedding, and at most one error, which ends it. Called on the event
loop; must not block."""
Result = jobs.LoadedModel | jobs.Memory | None

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class _Job:
    answer: asyncio.Future[Result]
    progress: Callable[[float], None] | None


class OutstandingWork:
    """Jobs and sequences of the worker of ``device_id``, by number."""

    def __init__(self, device_id: str) -> None:
        self._device_id = device_id
        self._numbers = itertools.count(1)
        self._jobs: dict[int, _Job] = {}
        self._sinks: dict[int, Sink] = {}

    def next_number(self) -> int:
        """Return a number for a job or a sequence."""
        return next(self._numbers)

    async def answer(self, job: int, progress: Callable[[float], None] | None = None) -> Result:
        """Wait for the answer of a job and return it. Raises the error of the job."""
        waiting = self._jobs[job] = _Job(asyncio.get_running_loop().create_future(), progress)
        try:
            return await waiting.answer
        finally:
            # A cancelled wait leaves the job running; its answer is dropped.
            self._jobs.pop(job, None)

    def settle(self, message: jobs.Done | jobs.JobFailed | jobs.Progress) -> None:
        """Pass a message about a job to its waiter, if it still waits."""
        job = self._jobs.get(message.job)
        if job is None:
            return
        match message:
            case jobs.Progress():
                if job.progress is not None:
                    job.progress(message.fraction)
            case jobs.Done():
                if not job.answer.done():
                    job.answer.set_result(message.result)
            case jobs.JobFailed():
                if not job.answer.done():
                    job.answer.set_exception(RemoteError(message.error))

    def open(self, sequence: int, sink: Sink) -> None:
        """Register the sink of a sequence."""
        self._sinks[sequence] = sink

    def drop(self, sequence: int) -> bool:
        """Forget a sequence; return whether it was running."""
        return self._sinks.pop(sequence, None) is not None

    def deliver(self, sequence: int, item: Item, last: bool) -> bool:
        """Pass ``item`` to the sequence's sink, if it is not cancelled; return whether the sink took it."""
        sink = self._sinks.pop(sequence, None) if last else self._sinks.get(sequence)
        return sink is None or self._pass(sequence, sink, item)

    def fail(self, error: Callable[[], ApiError]) -> None:
        """Fail all jobs and sequences, each with its own ``error()``."""
        unfinished, self._jobs = self._jobs, {}
        sinks, self._sinks = self._sinks, {}
        for job in unfinished.values():
            if not job.answer.done():
                job.answer.set_exception(error())
        for sequence, sink in sinks.items():
            self._pass(sequence, sink, error())

    def _pass(self, sequence: int, sink: Sink, item: Item) -> bool:
        try:
            sink(item)
        except Exception:
            # The reader of this sequence is broken; other sequences are not.
            logger.exception("%s: the sink of sequence %d failed", self._device_id, sequence)
            return False
        return True

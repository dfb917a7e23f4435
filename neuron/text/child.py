"""The daemon's handle on one text process: started when it is needed, one job at a time, replaced when it dies."""

import asyncio
import signal
from collections.abc import Sequence
from typing import Final

import msgspec

from cortex.wire.errors import RemoteError, UnavailableError
from neuron.device.process import WorkerProcess
from neuron.text import jobs
from neuron.text.jobs import Limits, Step

READY_TIMEOUT_S: Final = 60.0
WALL_FACTOR, WALL_LEAST_S = 4.0, 20.0
"""A job may take so many times its CPU time by the clock, and at least so long, on a machine that has other work."""
ENVIRONMENT: Final = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Environment for a single thread: CPU time is limited by process, and other jobs have other processes."""
NO_TRACES: Final = {"RUST_BACKTRACE": "0"}
"""A death by a limit is no bug of the library that it comes upon, whose frames would fill the log."""

_BY_LIMIT: Final = {
    signal.SIGPROF: "takes more CPU time than it may",
    signal.SIGSEGV: "takes a deeper stack than it may",
    signal.SIGBUS: "takes a deeper stack than it may",
    signal.SIGABRT: "takes more memory or a deeper stack than it may",
    signal.SIGTRAP: "takes more memory than it may",
    signal.SIGILL: "fails in foreign code",
}
"""The ends that a job brings about itself."""


class Death(Exception):
    """A text process ended with a job in hand. Its text goes on from what the process was doing."""

    def __init__(self, words: str, *, is_of_the_job: bool, step: Step | None) -> None:
        super().__init__(words)
        self.is_of_the_job = is_of_the_job
        """Whether it is clear that the job did it."""
        self.step = step
        """The step that it had begun, if it was reported."""


class TextProcess:
    """A process called ``name``, and its replacements."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.opened: set[int] = set()
        """The models that the process in being has open."""
        self._command = tuple(command)
        self._process: WorkerProcess | None = None
        self._answer: asyncio.Future[jobs.FromText] | None = None
        self._step: Step | None = None
        self._timed_out = False
        self._decode = msgspec.msgpack.Decoder(jobs.FromText).decode

    async def open(self, opening: jobs.Open) -> None:
        """Have the process read a model's text side, unless it has. Raises :class:`Death` and ApiError."""
        await self._start()
        if opening.model in self.opened:
            return
        try:
            answer = await self.ask(msgspec.json.encode(opening), opening.limits)
        except Death as death:
            # It was read once, so the waiting request is not the cause.
            raise Death(str(death), is_of_the_job=False, step=Step.FILES) from None
        if isinstance(answer, jobs.Refused):
            raise RemoteError(msgspec.structs.replace(answer.error, status=503, code=UnavailableError.code))
        self.opened.add(opening.model)

    async def ask(self, message: bytes, limits: Limits) -> jobs.FromText:
        """Return what the process answers. Raises :class:`Death`; UnavailableError if there can be no process."""
        process = await self._start()
        self._step = None
        process.send(message)
        return await self._next(process, max(WALL_LEAST_S, WALL_FACTOR * limits.cpu_s))

    def forget(self, model: int) -> None:
        """Have the process drop a model, if it has it."""
        if model in self.opened and self._process is not None:
            self.opened.discard(model)
            self._process.send(msgspec.json.encode(jobs.Close(model)))

    def end(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        self.opened.clear()
        if process is not None:
            process.destroy()

    async def _start(self) -> WorkerProcess:
        if self._process is not None and not self._process.ended.is_set():
            return self._process
        self._process = None
        self.opened.clear()
        try:
            process = WorkerProcess(
                self.name,
                self._command,
                environment={**ENVIRONMENT, **NO_TRACES},
                on_message=self._take,
                on_end=self._ended,
            )
        except OSError as error:
            raise UnavailableError(f"No text process can be started: {error.strerror}.", retry_after_s=2.0) from None
        self._process = process
        try:
            await self._next(process, READY_TIMEOUT_S)
        except Death as death:
            raise UnavailableError(f"A text process did not start: {death}.", retry_after_s=2.0) from None
        return process

    async def _next(self, process: WorkerProcess, timeout_s: float) -> jobs.FromText:
        self._timed_out = False
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[jobs.FromText] = loop.create_future()
        self._answer = answer
        timer = loop.call_later(timeout_s, self._time_out, process)
        if process.ended.is_set():
            self._ended("ended")
        try:
            return await answer
        finally:
            timer.cancel()
            self._answer = None

    def _time_out(self, process: WorkerProcess) -> None:
        self._timed_out = True
        process.kill("took too long")

    def _take(self, data: bytes) -> None:
        message = self._decode(data)
        if isinstance(message, jobs.Phase):
            self._step = message.step
        elif isinstance(message, jobs.Retiring):
            self.end()
        elif self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    def _ended(self, reason: str) -> None:
        if self._answer is None or self._answer.done():
            return
        status = self._process.status if self._process is not None else None
        if self._timed_out:
            death = Death("takes longer than it may", is_of_the_job=True, step=self._step)
        else:
            words = _BY_LIMIT.get(-status) if status is not None and status < 0 else None  # type: ignore[call-overload]
            death = Death(
                words or f"ended the process that did it ({reason})", is_of_the_job=words is not None, step=self._step
            )
        self._answer.set_exception(death)

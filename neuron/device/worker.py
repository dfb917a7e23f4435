"""Worker of a device as the daemon holds it: jobs and sequences in, results and token rows out.

When the process ends, every job and sequence fails at once, the process is replaced after a delay that grows with each
death in a row, and the owner, which keeps the list of models, reloads them before new sequences are taken.
"""

import asyncio
import contextlib
import dataclasses
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import assert_never

import msgspec

from cortex.supervise import Supervisor
from cortex.wire.errors import OverloadedError, RemoteError
from cortex.wire.node import ModelSpec, WorkerHealth, WorkerState
from neuron.device import jobs
from neuron.device.outstanding import Item, OutstandingWork, Result, Sink
from neuron.device.probe import CUDA_ENVIRONMENT
from neuron.device.process import KILL_GRACE_S, WorkerProcess
from neuron.errors import DeviceWorkerLostError, DeviceWorkerNotReadyError

TERMINATE_GRACE_S = 2.0
"""Time between SIGTERM and SIGKILL."""
MAX_PENDING_BYTES = 64 << 20
"""Bytes queued for a worker that does not read, above which new work is refused."""

TOKEN_BYTES = 4
"""Size of a token id in a row."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Delay before a worker is replaced: it doubles with each death in a row, and starts anew after a healthy life."""

    first_delay_s: float = 0.5
    max_delay_s: float = 30.0
    healthy_after_s: float = 60.0
    ready_timeout_s: float = 120.0
    """Time that a process has for its ``Ready``: it imports torch and makes a context."""

    def delay_s(self, deaths: int) -> float:
        """Return the delay before the next start, after ``deaths`` in a row (from 1)."""
        return min(self.max_delay_s, self.first_delay_s * 2.0 ** min(deaths - 1, 30))


class Worker:
    """Owner of the process of ``device_id``. Used from one event loop, on a thread that lives as long as the daemon.

    ``command`` starts the process (see :class:`WorkerProcess`), with ``environment`` added to this one's. ``on_state``
    gets every change of state. ``on_restarted`` is awaited after each replacement, with jobs allowed and
    sequences not; the worker is ready when it returns.
    """

    def __init__(
        self,
        device_id: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        on_state: Callable[[WorkerHealth], None] | None = None,
        on_restarted: Callable[[], Awaitable[None]] | None = None,
        policy: RestartPolicy | None = None,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._background = supervisor or Supervisor()
        self.device_id = device_id
        self.state = WorkerState.STOPPED
        self.restarts = 0
        self.recycles = 0
        self.fault: str | None = None
        self.ready: jobs.Ready | None = None
        self.running = 0
        self.waiting = 0
        self.generated = 0
        """Number of generated tokens."""
        self.on_restarted = on_restarted
        self._command = tuple(command)
        self._environment = {**CUDA_ENVIRONMENT, **(environment or {})}
        self._on_state = on_state
        self._policy = policy or RestartPolicy()
        self._process: WorkerProcess | None = None
        self._answered_start: asyncio.Event = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False
        self._deaths = 0
        self._started_at = 0.0
        self._start_s = 1.0
        self._work = OutstandingWork(device_id)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(jobs.FromWorker).decode

    def health(self) -> WorkerHealth:
        """Return the entry of this worker in ``/health``. ``fault`` is the reason of the last death."""
        return WorkerHealth(
            self.device_id,
            self.state,
            self.restarts,
            self.running,
            self.waiting,
            self.fault,
            self.recycles,
            self.generated,
        )

    # ------------------------------------------------------------------ life

    async def start(self) -> jobs.Ready:
        """Spawn the process and wait until it owns its device.

        Raises DeviceWorkerLostError if the first process does not get that far; nothing is left running then, and
        the worker may be started again.
        """
        if self._process is not None or self._supervisor is not None:
            raise RuntimeError(f"the worker of {self.device_id} is already started")
        self._stopping = False
        self._enter(WorkerState.STARTING)
        try:
            ready = await self._launch()
        except BaseException:
            self._enter(WorkerState.STOPPED)
            raise
        self._enter(WorkerState.READY)
        self._supervisor = self._background.start(f"worker {self.device_id}", self._supervise)
        return ready

    async def stop(self, timeout_s: float = 10.0) -> None:
        """End the process: ``Shutdown``, SIGTERM after ``timeout_s``, then SIGKILL. Jobs and sequences fail.

        Takes at most ``timeout_s`` + 8 s. Stopping twice is fine. When cancelled, the process is killed at once.
        """
        self._stopping = True
        supervisor, self._supervisor = self._supervisor, None
        process = self._process
        try:
            if supervisor is not None:
                supervisor.cancel()
                await asyncio.wait({supervisor})
            process = self._process
            if process is not None:
                process.send(self._encode(jobs.Shutdown()))
                if not await _within(process.ended, timeout_s):
                    logger.warning("%s: pid %d ignores Shutdown: SIGTERM", self.device_id, process.pid)
                    process.signal(signal.SIGTERM)
                    if not await _within(process.ended, TERMINATE_GRACE_S):
                        process.kill("stopped")
                        await _within(process.ended, KILL_GRACE_S + 1.0)
        finally:
            if process is not None:
                process.destroy()
            self._fail_everything("was stopped")
            self._enter(WorkerState.STOPPED)

    async def _launch(self) -> jobs.Ready:
        """Spawn a process and wait for its ``Ready``."""
        began = time.monotonic()
        self._answered_start.clear()
        try:
            process = WorkerProcess(
                self.device_id,
                self._command,
                environment=self._environment,
                on_message=self._take,
                on_end=self._lost,
            )
        except OSError as error:
            self.fault = f"cannot be started: {error}"
            raise self._lost_error() from error
        self._process = process
        try:
            if not await _within(self._answered_start, self._policy.ready_timeout_s) and not process.ended.is_set():
                process.kill(f"was not ready within {self._policy.ready_timeout_s:g} s")
                await process.ended.wait()
        except BaseException:
            process.destroy()
            raise
        if self.ready is None or process.ended.is_set():
            raise self._lost_error()
        self._started_at = time.monotonic()
        self._start_s = self._started_at - began
        logger.info("%s: worker pid %d ready after %.2f s", self.device_id, process.pid, self._start_s)
        return self.ready

    async def _supervise(self) -> None:
        """Replace the process whenever it ends."""
        while True:
            if self._process is not None:
                await self._process.ended.wait()
            delay_s = self._policy.delay_s(self._deaths)
            logger.warning("%s: worker lost: %s; restart in %.2f s", self.device_id, self.fault, delay_s)
            self._enter(WorkerState.RECOVERING)
            await asyncio.sleep(delay_s)
            try:
                await self._launch()
            except DeviceWorkerLostError:
                if self._process is None and self.state is not WorkerState.POISONED:
                    self._deaths += 1  # it was not even spawned, so _lost was not called
                continue
            self.restarts += 1
            if await self._reload():
                self._enter(WorkerState.READY)

    async def _reload(self) -> bool:
        """Have the owner reload its models; return whether the process survived it."""
        process = self._process
        if process is None or process.ended.is_set():
            return False
        if self.on_restarted is None:
            return True
        reload = asyncio.ensure_future(self.on_restarted())
        death = asyncio.ensure_future(process.ended.wait())
        try:
            await asyncio.wait({reload, death}, return_when=asyncio.FIRST_COMPLETED)
            if process.ended.is_set():
                return False
            if not reload.cancelled() and (error := reload.exception()):
                logger.error("%s: reloading after a restart failed", self.device_id, exc_info=error)
            return True
        finally:
            for task in (reload, death):
                task.cancel()
            await asyncio.wait({reload, death})

    def _enter(self, state: WorkerState) -> None:
        if state is self.state:
            return
        self.state = state
        if self._on_state is None:
            return
        try:
            self._on_state(self.health())
        except Exception:
            logger.exception("%s: a receiver of its state failed", self.device_id)

    # ------------------------------------------------------------------ requests of the owner

    async def load(
        self,
        spec: ModelSpec,
        path: str,
        *,
        progress: Callable[[float], None] | None = None,
        group: jobs.GroupSettings | None = None,
    ) -> jobs.LoadedModel:
        """Load a model, or a rank's part of it; ``progress`` gets 0 to 1.

        Raises RemoteError, DeviceWorkerLostError and -NotReadyError.
        """
        result = await self._submit(lambda job: jobs.Load(job, spec, path, group), progress)
        if not isinstance(result, jobs.LoadedModel):
            raise self._unexpected("a load", result)
        return result

    async def unload(self, model: str) -> None:
        """Unload a model; its sequences are cancelled. Raises as :meth:`load`."""
        await self._submit(lambda job: jobs.Unload(job, model))

    async def memory(self) -> jobs.Memory:
        """Return the memory of the device. Raises as :meth:`load`."""
        result = await self._submit(jobs.QueryMemory)
        if not isinstance(result, jobs.Memory):
            raise self._unexpected("a query of memory", result)
        return result

    def run(self, asked: jobs.Generate | jobs.Embed, sink: Sink) -> int:
        """Run a sequence under a number of this worker's, and return the number; ``sink`` gets its output.

        Raises DeviceWorkerNotReadyError, and OverloadedError if the worker does not read what it is sent.
        """
        if self.state is not WorkerState.READY:
            raise self._not_ready()
        sequence = self._work.next_number()
        self._send(msgspec.structs.replace(asked, sequence=sequence))
        self._work.open(sequence, sink)
        return sequence

    def cancel(self, sequence: int) -> None:
        """Stop a sequence; its sink gets nothing more. A finished or unknown sequence is ignored."""
        if self._work.drop(sequence) and self._process is not None:
            self._process.send(self._encode(jobs.Cancel(sequence)))

    def replace(self, reason: str) -> None:
        """Kill the process, which may hang, and start another. An ending process just ends."""
        self._kill(reason)

    async def _submit(
        self, make: Callable[[int], jobs.ToWorker], progress: Callable[[float], None] | None = None
    ) -> Result:
        number = self._work.next_number()
        self._send(make(number))
        return await self._work.answer(number, progress)

    def _send(self, message: jobs.ToWorker) -> None:
        if self._process is None or self.ready is None or self._stopping:
            raise self._not_ready()
        if self._process.pending_bytes > MAX_PENDING_BYTES:
            raise OverloadedError(
                f"the worker of {self.device_id} does not read: {self._process.pending_bytes} bytes wait for it",
                retry_after_s=1.0,
            )
        self._process.send(self._encode(message))

    # ------------------------------------------------------------------ messages of the process

    def _take(self, data: bytes) -> None:
        try:
            message = self._decode(data)
        except msgspec.MsgspecError as error:
            self._kill(f"sent a message that does not parse: {error}")
            return
        match message:
            case jobs.Tokens():
                self.running, self.waiting = message.running, message.waiting
                for row in message.rows:
                    self.generated += len(row.ids) // TOKEN_BYTES
                    self._deliver(row.sequence, row, row.end is not None)
            case jobs.Embedding():
                self._deliver(message.sequence, message, True)
            case jobs.SequenceFailed():
                self._deliver(message.sequence, RemoteError(message.error), True)
            case jobs.Done() | jobs.JobFailed() | jobs.Progress():
                self._work.settle(message)
            case jobs.Ready():
                if message.device != self.device_id or self.ready is not None:
                    self._kill(f"reported ready for {message.device}")
                    return
                self.ready = message
                self._answered_start.set()
            case jobs.Poisoned():
                if self._process is not None:
                    self._process.expect_end(f"device fault: {message.reason}")
            case _:
                assert_never(message)

    def _deliver(self, sequence: int, item: Item, last: bool) -> None:
        if not self._work.deliver(sequence, item, last):
            self.cancel(sequence)

    def _kill(self, reason: str) -> None:
        if self._process is not None:
            self._process.kill(reason)

    def _lost(self, reason: str) -> None:
        """Fail all work and record the reason; called once when the process has ended."""
        self._process = None
        lived_s = time.monotonic() - self._started_at if self.ready is not None else 0.0
        self.ready = None
        self._answered_start.set()  # its waiters find no process
        if self._stopping:
            return
        self._deaths = 1 if lived_s >= self._policy.healthy_after_s else self._deaths + 1
        self.fault = reason
        if self.state is not WorkerState.STARTING:
            self._enter(WorkerState.POISONED)
        self._fail_everything(f"was lost: {reason}")

    def _fail_everything(self, what: str) -> None:
        message = f"the worker of {self.device_id} {what}; the request was not finished"
        self.running = self.waiting = 0
        self._work.fail(lambda: DeviceWorkerLostError(message, retry_after_s=self._retry_after_s()))

    def _retry_after_s(self) -> float:
        """Return the likely time until a replacement is ready: the delay and the length of the last start."""
        return max(1.0, self._policy.delay_s(max(self._deaths, 1)) + self._start_s)

    def _lost_error(self) -> DeviceWorkerLostError:
        return DeviceWorkerLostError(
            f"the worker of {self.device_id} {self.fault}", retry_after_s=self._retry_after_s()
        )

    def _not_ready(self) -> DeviceWorkerNotReadyError:
        return DeviceWorkerNotReadyError(
            f"the worker of {self.device_id} is {self.state}", retry_after_s=self._retry_after_s()
        )

    def _unexpected(self, question: str, answer: object) -> DeviceWorkerLostError:
        self._kill(f"answered {question} with {type(answer).__name__}")
        return DeviceWorkerLostError(
            f"the worker of {self.device_id} answered {question} with {type(answer).__name__}",
            retry_after_s=self._retry_after_s(),
        )


async def _within(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for ``event``; return whether it was set in time."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)
    return event.is_set()

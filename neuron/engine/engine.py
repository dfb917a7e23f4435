"""The engine of a device loop: messages in, steps while there is work, messages out.

The scheduler decides about a step and the executor computes it. Models share the device round-robin, a step each; a
load advances by one layer between steps, so that it stalls no stream. An error belongs to the request or the job that
caused it; only a device fault leaves the engine, as :class:`DeviceFault`.
"""

import dataclasses
import logging
import pathlib
import select
from collections.abc import Callable, Generator
from typing import Final, assert_never

import msgspec
import numpy as np
import torch

from cortex.wire.errors import (
    ApiError,
    ContextLengthError,
    ErrorInfo,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    UnavailableError,
    UnprocessableError,
)
from neuron.device.jobs import (
    Cancel,
    Done,
    Embed,
    FromWorker,
    Generate,
    JobFailed,
    Load,
    Memory,
    Progress,
    QueryMemory,
    SamplerSettings,
    SequenceEnd,
    SequenceFailed,
    Shutdown,
    TokenRow,
    Tokens,
    ToWorker,
    Unload,
)
from neuron.engine.compiling import Compiling
from neuron.engine.device_graphs import Graphs
from neuron.engine.errors import GroupLostError, error_info, raise_device_fault, ran_out
from neuron.engine.loading import load_model
from neuron.engine.minimum import Minimum
from neuron.engine.model_engine import ModelEngine
from neuron.engine.prefix import root_key
from neuron.engine.process_memory import return_freed_memory, used_bytes
from neuron.engine.sampler import check_settings
from neuron.engine.sequence import Constrained, Sequence
from neuron.engine.tensor_parallel import Follower
from neuron.engine.thinking_budget import ThinkingBudget
from neuron.engine_settings import DEFAULTS, EngineSettings
from neuron.models.errors import LoadFailedError

logger = logging.getLogger(__name__)

QUEUE_RETRY_AFTER_S: Final = 2.0
COMPILE_WAIT_S: Final = 0.005
"""Longest step that only waits for a grammar."""
FOLLOW_WAIT_S: Final = 0.5
"""Longest step that only waits for rank 0 of a model."""


@dataclasses.dataclass(slots=True)
class _Loading:
    """A load in progress."""

    job: Load
    progress: Generator[float, None, ModelEngine | Follower]
    reported: float = 0.0


class Engine:
    """All models of one device.

    ``send`` takes an encoded message for the daemon, ``memory`` returns (free, total) bytes of the device, and ``stop``
    is called on :class:`Shutdown`. A model queues ``max_waiting`` sequences beyond its free slots. ``channel_fd`` is
    readable when a message of the daemon waits: a follower polls it, and a multi-step decode ends for it. ``graphs``
    makes the :class:`Graphs` of a model on a GPU.
    """

    def __init__(
        self,
        device: str,
        send: Callable[[bytes], None],
        memory: Callable[[], tuple[int, int]],
        stop: Callable[[], None],
        *,
        max_waiting: int = 256,
        channel_fd: int = -1,
        graphs: Callable[[], Graphs] | None = None,
        settings: EngineSettings = DEFAULTS,
    ) -> None:
        self._settings = settings
        self._graphs = graphs
        self._channel_fd = channel_fd
        self._name = device
        # cpu:1 is a second worker on the same CPU.
        self._device = torch.device("cpu" if device.startswith("cpu") else device)
        self._send_bytes = send
        self._memory = memory
        self._stop = stop
        self._max_waiting = max_waiting
        self._models: dict[str, ModelEngine] = {}
        self._compiling = Compiling()
        self._model_of: dict[int, ModelEngine] = {}
        self._loads: dict[str, _Loading] = {}
        self._followers: dict[str, Follower] = {}
        self._left: set[str] = set()
        """Models whose rank 0 has left before the daemon unloaded them."""
        self._decoder = msgspec.msgpack.Decoder(ToWorker)
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def busy(self) -> bool:
        """Return whether there is a step to run."""
        return bool(self._loads or self._followers or self._compiling) or any(
            model.busy for model in self._models.values()
        )

    def handle(self, message: bytes) -> None:
        """Handle one message of the daemon; an unreadable one fails its request or job. Raises DeviceFault."""
        try:
            job = self._decoder.decode(message)
        except msgspec.MsgspecError as error:
            self._refuse(message, error)
            return
        try:
            self._do(job)
        except Exception as error:
            raise_device_fault(error)
            raise

    def _refuse(self, message: bytes, error: Exception) -> None:
        """Answer an unreadable message: its request or job fails, and no other does."""
        logger.error("a message of %d bytes cannot be read: %s", len(message), error)
        info = InvalidRequestError(f"the worker of {self._name} cannot read a message: {error}").info()
        try:
            fields = msgspec.msgpack.decode(message)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            return
        if not isinstance(fields, dict):
            return
        if isinstance(number := fields.get("sequence"), int) and number not in self._model_of:
            self._send(SequenceFailed(number, info))
        elif isinstance(number := fields.get("job"), int):
            self._send(JobFailed(number, info))

    def _do(self, job: ToWorker) -> None:
        match job:
            case Generate() | Embed():
                self._start(job)
            case Cancel():
                self._cancel([job.sequence])
            case Load():
                self._load(job)
            case Unload():
                self._unload(job)
            case QueryMemory():
                free_bytes, total_bytes = self._free_bytes(), self._memory()[1]
                self._send(Done(job.job, Memory(total_bytes, free_bytes, used_bytes(self._device))))
            case Shutdown():
                self._shutdown()
            case _:
                assert_never(job)

    def step(self) -> None:
        """Advance the oldest load by a layer, and run one step of the next model that has work.

        Of models with another rank 0, run its steps; with nothing else to do, wait a moment for these or a message.
        Raises DeviceFault.
        """
        try:
            self._advance_all()
        except Exception as error:
            raise_device_fault(error)
            raise

    def _advance_all(self) -> None:
        if self._compiling:
            self._take_compiled()
        if self._followers:
            self._follow(0.0 if self._loads or any(model.busy for model in self._models.values()) else FOLLOW_WAIT_S)
        if self._loads:
            self._advance_load(next(iter(self._loads.values())))
        busy = [name for name, model in self._models.items() if model.busy]
        if busy:
            # To the end of the queue: models run round-robin.
            model = self._models[busy[0]] = self._models.pop(busy[0])
            self._step(model, alone=len(busy) == 1 and not (self._loads or self._followers))

    def _take_compiled(self) -> None:
        """Queue sequences whose grammar is compiled; with nothing else to do, wait a moment for one."""
        if not (self._loads or self._followers or any(model.busy for model in self._models.values())):
            self._compiling.wait(COMPILE_WAIT_S)
        for model, sequence, job, found in self._compiling.take_done():
            try:
                if isinstance(found, BaseException):
                    raise found
                _queue(model, sequence, job, found)
            except Exception as error:  # noqa: BLE001 (any error is this request's)
                self._model_of.pop(sequence.number, None)
                self._send(SequenceFailed(sequence.number, error_info(error)))

    def _follow(self, timeout_s: float) -> None:
        sources = select.poll()
        for descriptor in (self._channel_fd, *(follower.fileno() for follower in self._followers.values())):
            if descriptor >= 0:
                sources.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in sources.poll(timeout_s * 1e3)}
        for name, follower in list(self._followers.items()):
            if follower.fileno() in ready and not follower.follow():
                self._leave(name)
                self._left.add(name)

    def _leave(self, name: str) -> None:
        self._followers.pop(name).close()

    # -------------------------------------------------------------- sequences

    def _start(self, job: Generate | Embed) -> None:
        try:
            model = self._models.get(job.model)
            if model is None:
                raise ModelNotFoundError(f"model {job.model!r} is not loaded on {self._name}", param="model")
            sequence = _sequence(job, model)
            if model.scheduler.num_without_slot + self._compiling.count(model) >= self._max_waiting:
                raise OverloadedError(
                    f"{len(model.scheduler.waiting)} requests wait for {job.model!r} already; try again shortly",
                    retry_after_s=QUEUE_RETRY_AFTER_S,
                )
            if isinstance(job, Generate) and job.constraint is not None:
                self._compiling.start(model, sequence, job)
            else:
                _queue(model, sequence, job, None)
        except Exception as error:  # noqa: BLE001 (any error is this request's)
            self._send(SequenceFailed(job.sequence, error_info(error)))
        else:
            self._model_of[job.sequence] = model

    def _cancel(self, numbers: list[int]) -> None:
        rows = []
        for number in numbers:
            model = self._model_of.pop(number, None)
            if model is not None:
                self._compiling.drop(number)
                model.scheduler.remove(number)
                rows.append(TokenRow(number, b"", SequenceEnd.CANCELLED))
        self._send_rows(rows)

    def _step(self, model: ModelEngine, *, alone: bool) -> None:
        output = model.step(alone=alone)
        for number, error in output.failures:
            del self._model_of[number]
            self._send(SequenceFailed(number, error))
        for embedding in output.embeddings:
            del self._model_of[embedding.sequence]
            self._send(embedding)
        for row in output.rows:
            if row.end is not None:
                del self._model_of[row.sequence]
        self._send_rows(output.rows)
        if not model.busy:
            model.scheduler.check_integrity()

    def _send_rows(self, rows: list[TokenRow]) -> None:
        if rows:
            schedulers = [model.scheduler for model in self._models.values()]
            running = sum(len(scheduler.running) for scheduler in schedulers)
            waiting = sum(len(scheduler.waiting) for scheduler in schedulers)
            self._send(Tokens(tuple(rows), running, waiting))

    # -------------------------------------------------------------- models

    def _load(self, job: Load) -> None:
        name = job.spec.id
        if name in self._models or name in self._loads or name in self._followers:
            error = UnprocessableError(f"model {name!r} is loaded or loading on {self._name} already", param="id")
            self._send(JobFailed(job.job, error.info()))
            return
        self._left.discard(name)
        pieces = load_model(
            job.spec,
            pathlib.Path(job.path),
            self._device,
            self._free_bytes,
            job.group,
            self._graphs,
            self._channel_fd,
            self._settings,
        )
        self._loads[name] = _Loading(job, pieces)

    def _advance_load(self, loading: _Loading) -> None:
        job = loading.job
        try:
            fraction = next(loading.progress)
        except StopIteration as finished:
            del self._loads[job.spec.id]
            follows = job.group is not None and job.group.rank > 0
            (self._followers if follows else self._models)[job.spec.id] = finished.value
            self._send(Done(job.job, finished.value.loaded))
        except Exception as error:  # noqa: BLE001 (any error is this job's)
            if not isinstance(error, GroupLostError):  # a load that fails leaves the device sound
                raise_device_fault(error)
            info = _load_error(job.spec.id, error)
            # Not the error itself: a log record would keep its frames alive, and their tensors.
            logger.warning("load of %s failed: %s", job.spec.id, info.message)
            del self._loads[job.spec.id]
            self._send(JobFailed(job.job, info))
            del error, loading.progress
            return_freed_memory(self._device)
        else:
            if fraction == 0 or fraction - loading.reported >= 0.05:
                loading.reported = fraction
                self._send(Progress(job.job, fraction))

    def _unload(self, job: Unload) -> None:
        if job.model in self._loads:
            loading = self._loads.pop(job.model)
            loading.progress.close()
            error = UnavailableError(f"model {job.model!r} was unloaded while it loaded")
            self._send(JobFailed(loading.job.job, error.info()))
            del loading
        elif job.model in self._models:
            model = self._models[job.model]
            self._cancel([*model.scheduler.running, *model.scheduler.waiting, *self._compiling.numbers(model)])
            model.close()
            del self._models[job.model], model
        elif job.model in self._followers:
            self._leave(job.model)
        elif job.model in self._left:
            self._left.remove(job.model)
        else:
            missing = ModelNotFoundError(f"model {job.model!r} is not loaded on {self._name}", param="id")
            self._send(JobFailed(job.job, missing.info()))
            return
        return_freed_memory(self._device)
        self._send(Done(job.job))

    def _shutdown(self) -> None:
        self._cancel(list(self._model_of))
        self._compiling.close()
        for loading in self._loads.values():
            loading.progress.close()
        self._loads.clear()
        for model in self._models.values():
            model.close()
        self._models.clear()
        for name in list(self._followers):
            self._leave(name)
        return_freed_memory(self._device)
        self._stop()

    def _free_bytes(self) -> int:
        """Return the bytes for a new model. Memory planned for the models here is not free, touched or not.

        A host commits memory on first touch, and a GPU's workspace is allocated by the first step and shared by all
        models.
        """
        free_bytes = self._memory()[0]
        plans = [plan for model in self._models.values() for plan in model.plan.parts]
        plans += [follower.plan for follower in self._followers.values()]
        planned_bytes = sum(plan.kv_cache_bytes for plan in plans)
        if self._device.type != "cpu":
            planned_bytes += sum(plan.weights_bytes for plan in plans)
            planned_bytes += max((plan.workspace_bytes for plan in plans), default=0)
            planned_bytes = max(0, planned_bytes - used_bytes(self._device))
        return max(0, free_bytes - planned_bytes)

    def _send(self, message: FromWorker) -> None:
        self._send_bytes(self._encoder.encode(message))


def _load_error(name: str, error: Exception) -> ErrorInfo:
    """Return ``error`` of a load as it is sent: any unforeseen one is about the files."""
    if isinstance(error, ApiError) or ran_out(error) or isinstance(getattr(error, "code", None), str):
        return error_info(error)
    return LoadFailedError(f"the files of {name!r} cannot be loaded: {type(error).__name__}: {error}").info()


def _queue(model: ModelEngine, sequence: Sequence, job: Generate | Embed, constraint: Constrained | None) -> None:
    """Queue a sequence, with its grammar, the bound on its reasoning, and its minimum length."""
    if isinstance(job, Generate) and job.thinking is not None:
        constraint = ThinkingBudget(constraint, job.thinking, model.config.vocab_size)
    if isinstance(job, Generate) and job.min_tokens and sequence.eos:
        constraint = Minimum(constraint, job.min_tokens, sequence.eos, model.config.vocab_size)
    sequence.constraint = constraint
    model.scheduler.add(sequence)


def _sequence(job: Generate | Embed, model: ModelEngine) -> Sequence:
    """Return the sequence of ``job``. Raises :class:`InvalidRequestError` for one that can never be served."""
    context_tokens, vocab_size = model.plan.context_tokens, model.config.vocab_size
    if len(job.prompt) % 4 or not job.prompt:
        raise InvalidRequestError("the prompt has no tokens", param="prompt")
    prompt = np.frombuffer(job.prompt, np.int32)
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocab_size:
        raise InvalidRequestError(
            f"the prompt holds a token that is not among the model's {vocab_size}", param="prompt"
        )
    if len(prompt) >= context_tokens:
        raise ContextLengthError(context_tokens, len(prompt), param="prompt")
    root = root_key(job.cache_salt)
    if isinstance(job, Embed):
        settings = SamplerSettings(temperature=0.0)
        return Sequence(
            job.sequence, prompt, 1, frozenset(), settings, job.principal, job.priority, job.pooling, root=root
        )
    if job.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens is {job.max_tokens}; it must be at least 1", param="max_tokens")
    check_settings(job.sampler, vocab_size)
    if any(not 0 < at <= len(prompt) for at in job.breakpoints) or list(job.breakpoints) != sorted(job.breakpoints):
        raise InvalidRequestError(
            f"the breakpoints {job.breakpoints} do not ascend within a prompt of {len(prompt)} tokens", param="prompt"
        )
    sequence = Sequence(
        job.sequence,
        prompt,
        min(job.max_tokens, context_tokens - len(prompt)),
        frozenset(job.eos),
        job.sampler,
        job.principal,
        job.priority,
        root=root,
        breakpoints=job.breakpoints,
    )
    if job.scores_prompt:
        if job.sampler.top_logprobs < 0:
            raise InvalidRequestError("a prompt is scored only with log probabilities", param="logprobs")
        sequence.scores_prompt = True
    return sequence

"""The daemon's text processes: foreign code that reads a client's text or a model's files runs in them.

Four queues with a process each: short prompts, long ones, grammars and models' files, so that costly jobs delay no
short chat. On a host with many cores a queue has two processes; the process for files lives while it reads a model's. A
process that dies fails only its current job: the others wait in the daemon. A death by a limit is an error of that
request; after any other death the job is retried once. Within a queue, principals are served round-robin.
"""

import array
import asyncio
import collections
import dataclasses
import itertools
import logging
import sys
from collections.abc import Sequence, Set
from enum import Enum
from typing import Final, TypeVar

import msgspec
from tokenizers import Tokenizer

from cortex.wire.errors import (
    ApiError,
    InvalidRequestError,
    InvalidSchemaError,
    OverloadedError,
    RemoteError,
    UnavailableError,
)
from cortex.wire.node import SpecialTokensInText
from cortex.wire.request import InferenceRequest, OutputFormat, Sampling
from neuron.device.probe import usable_cores
from neuron.errors import PromptTooCostlyError, TemplateError, UnsupportedTokenizerError
from neuron.text import jobs
from neuron.text.child import Death, TextProcess
from neuron.text.forms.registry import FORMS, REASONING_FORMS
from neuron.text.jobs import Limits, Step
from neuron.text.model_text import param_of_grammar
from neuron.text.schema import holds_schemas

MAX_WAITING: Final = 1024
"""Jobs that may wait in a queue; further ones are refused with 429."""
MAX_WAITING_BYTES: Final = 256 << 20
"""Bytes of the waiting jobs of a queue."""
SHARE_OF_ONE: Final = 4
"""Divisor of both limits for a single principal, so that others find space."""
MAX_TRIES: Final = 2
SHORT_BYTES: Final = 32 << 10
"""Requests up to this size are short: at most 0.05 s of CPU time."""
COSTLY_NICENESS: Final = 5
"""Niceness of the processes for all other jobs, which take seconds: they give way to the event loop."""
SEVERAL_CORES: Final = 4
MANY_CORES: Final = 8

OPEN_LIMITS: Final = Limits(cpu_s=30.0, data_bytes=2 << 30)
"""Limits for reading a model's files; 262,144 pieces of SentencePiece take 4 s and 0.6 GiB."""
SHORT_LIMITS: Final = Limits(cpu_s=3.0, data_bytes=128 << 20)
LONG_LIMITS: Final = Limits(cpu_s=10.0, data_bytes=320 << 20)
GRAMMAR_LIMITS: Final = Limits(cpu_s=2.0, data_bytes=96 << 20)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class QueueName(Enum):
    """Queue that a job waits in, by its cost."""

    SHORT = "short"
    LONG = "long"
    GRAMMAR = "grammar"
    FILES = "files"


class TextPool:
    """Owns the text processes, each started when it is first needed. Use it from one event loop."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-P", "-m", "neuron.text")) -> None:
        cores = usable_cores()
        costly = 2 if cores >= MANY_CORES else 1
        sizes = {
            QueueName.SHORT: 2 if cores >= SEVERAL_CORES else 1,
            QueueName.LONG: costly,
            QueueName.GRAMMAR: costly,
            QueueName.FILES: 1,
        }
        self._open: set[int] = set()
        """The models that are open or being opened: jobs of others are not done."""
        costly_command = (*command, "--nice", str(COSTLY_NICENESS))
        self._queues_by_name = {
            queue: _JobQueue(queue, command if queue is QueueName.SHORT else costly_command, size, self._open)
            for queue, size in sizes.items()
        }
        self._models = itertools.count(1)
        self._numbers = itertools.count(1)

    async def open(
        self,
        path: str,
        num_tokens: int,
        eos: tuple[int, ...],
        special: SpecialTokensInText = SpecialTokensInText.TEXT,
        *,
        finds_breakpoints: bool = False,
    ) -> "TextModel":
        """Read the text side of the model at ``path``. Raises :class:`ApiError`, 422 for files that cannot be used."""
        number, model = next(self._numbers), next(self._models)
        opening = jobs.Open(number, OPEN_LIMITS, model, path, num_tokens, eos, special, finds_breakpoints)
        self._open.add(model)
        try:
            opened = await self.run(QueueName.FILES, opening, opening)
            assert isinstance(opened, jobs.Opened)
            tokenizer = await asyncio.to_thread(_read_decoder, opened.description.decoder)
            # The files can be read, so this delays no other job for long, and no chat will wait for it later.
            await self.run(QueueName.SHORT, opening, opening)
        except BaseException:
            self.close(model)
            raise
        return TextModel(self, opening, msgspec.structs.replace(opened.description, decoder=b""), tokenizer)

    def close(self, model: int) -> None:
        """Have all processes forget a model, and its jobs refused."""
        self._open.discard(model)
        for queue in self._queues_by_name.values():
            for process in queue.processes:
                process.forget(model)

    async def run(
        self, queue: QueueName, job: jobs.Job, opening: jobs.Open, principal: str = "", data: bytes | None = None
    ) -> jobs.FromText:
        """Return the answer to ``job``, of the model that ``opening`` opens; ``data`` is the job, if it is encoded.

        Raises :class:`ApiError`.
        """
        data = _encoded(job) if data is None else data
        return await self._queues_by_name[queue].run(job, opening, principal, data)

    def next_number(self) -> int:
        """Return the number of a new job."""
        return next(self._numbers)

    async def stop(self) -> None:
        """End all processes; what they do or wait for fails."""
        await asyncio.gather(*(queue.stop() for queue in self._queues_by_name.values()))


class TextModel:
    """The text side of a model in the daemon: answers are decoded here, prompts built in text processes."""

    def __init__(
        self, pool: TextPool, opening: jobs.Open, description: jobs.TextDescription, tokenizer: Tokenizer
    ) -> None:
        self._pool = pool
        self._opening = opening
        self._ends = array.array("q", description.token_ends)
        self._token_bytes = description.token_bytes
        self.tokenizer = tokenizer
        """Makes text of ids; it makes no ids."""
        self.can_chat = description.can_chat
        self.call_form = FORMS[description.call_form]
        self.tags = REASONING_FORMS.get(description.reasoning)
        self.tag_ids = description.tag_ids
        self.early_end = description.early_end
        """Ids of ``tags``; ``None`` where they are no tokens."""
        self.markers = description.markers
        self.vocabulary_digest = description.vocabulary_digest

    async def build(self, request: InferenceRequest, context_tokens: int) -> jobs.Built:
        """Return the prompt of ``request``. Raises :class:`ApiError`."""
        return await self._prompt(jobs.Build, jobs.Built, request, context_tokens)

    async def count(self, request: InferenceRequest, context_tokens: int) -> int:
        """Return how many tokens the prompt of ``request`` has. Raises :class:`ApiError`."""
        return (await self._prompt(jobs.Count, jobs.Counted, request, context_tokens)).num_tokens

    async def tokenise(self, texts: Sequence[str], context_tokens: int, principal: str = "") -> tuple[bytes, ...]:
        """Return the int32 ids of each of ``texts``. Raises :class:`ApiError`."""
        queue, limits = _queue_for(sum(map(len, texts)))
        job = jobs.Tokenise(self._pool.next_number(), limits, self._opening.model, tuple(texts), context_tokens)
        return (await self._ask(queue, job, jobs.Tokenised, principal)).ids

    async def grammar(self, request: InferenceRequest) -> str | None:
        """Return the grammar that the answer to ``request`` must follow, tried. Raises :class:`ApiError`."""
        job = jobs.Check(self._pool.next_number(), GRAMMAR_LIMITS, self._opening.model, _shape_of(request))
        return (await self._ask(QueueName.GRAMMAR, job, jobs.Checked, request.principal)).grammar

    async def left_out(self, request: InferenceRequest) -> tuple[str, ...]:
        """Return the keywords in the schemas of ``request`` that will not be enforced. Raises :class:`ApiError`."""
        if not holds_schemas(request):
            return ()
        job = jobs.Ask(self._pool.next_number(), GRAMMAR_LIMITS, self._opening.model, _shape_of(request))
        return (await self._ask(QueueName.GRAMMAR, job, jobs.LeftOut, request.principal)).keywords

    def text_of(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each of ``ids``."""
        known, ends = self._token_bytes, self._ends
        return [known[ends[token - 1] if token else 0 : ends[token]] if token < len(ends) else b"" for token in ids]

    def close(self) -> None:
        """Free what the text processes hold of this model."""
        self._pool.close(self._opening.model)

    async def _prompt(
        self,
        kind: type[jobs.Build] | type[jobs.Count],
        answer: type[_T],
        request: InferenceRequest,
        context_tokens: int,
    ) -> _T:
        # Numbers of sampling may be such that JSON does not have.
        asked = msgspec.structs.replace(
            request, sampling=Sampling(bad_words=request.sampling.bad_words), stop=(), output_format=OutputFormat()
        )
        # All of it is rendered and tokenised, not only what the user wrote last.
        encoded = _encoded(asked)
        queue, limits = _queue_for(len(encoded))
        job = kind(self._pool.next_number(), limits, self._opening.model, asked, context_tokens)
        data = _encoded(msgspec.structs.replace(job, request=msgspec.Raw(encoded)))
        return await self._ask(queue, job, answer, request.principal, data)

    async def _ask(
        self, queue: QueueName, job: jobs.Job, answer: type[_T], principal: str, data: bytes | None = None
    ) -> _T:
        found = await self._pool.run(queue, job, self._opening, principal, data)
        assert isinstance(found, answer)
        return found


def _shape_of(request: InferenceRequest) -> InferenceRequest:
    """Return the part of a request that determines its grammar."""
    return InferenceRequest(
        request.model, tools=request.tools, tool_choice=request.tool_choice, output_format=request.output_format
    )


def _queue_for(size: int) -> tuple[QueueName, Limits]:
    return (QueueName.SHORT, SHORT_LIMITS) if size <= SHORT_BYTES else (QueueName.LONG, LONG_LIMITS)


def _encoded(value: msgspec.Struct) -> bytes:
    try:
        return msgspec.json.encode(value)
    except UnicodeError:
        raise InvalidRequestError("The request holds half of a surrogate pair, which is no text.") from None
    except RecursionError:
        raise InvalidRequestError("The request is nested too deeply.") from None


def _read_decoder(decoder: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(decoder)
    except Exception as error:  # noqa: BLE001 (it has no class of its own)
        raise UnsupportedTokenizerError(f"The tokenizer's decoder cannot be read: {str(error)[:300]}.") from None


@dataclasses.dataclass(slots=True, eq=False)
class _Waiting:
    """A job in a queue."""

    job: jobs.Job
    opening: jobs.Open
    data: bytes
    answer: asyncio.Future[jobs.FromText]
    tries: int = 0


class _JobQueue:
    """Jobs of one kind and the processes that do them."""

    def __init__(self, queue: QueueName, command: Sequence[str], num_processes: int, open_models: Set[int]) -> None:
        self._name = queue
        self._open = open_models
        self.processes = [TextProcess(f"text:{queue.value}-{index}", command) for index in range(num_processes)]
        self._servers: list[asyncio.Task[None]] = []
        self._queues: collections.OrderedDict[str, collections.deque[_Waiting]] = collections.OrderedDict()
        self._num_waiting = 0
        self._waiting_bytes = 0
        self._arrived = asyncio.Event()
        self._stopped = False

    async def run(self, job: jobs.Job, opening: jobs.Open, principal: str, data: bytes) -> jobs.FromText:
        if self._stopped:
            raise UnavailableError("This neuron is shutting down.", retry_after_s=1.0)
        own = self._queues.get(principal, ())
        if self._num_waiting >= MAX_WAITING or len(own) >= MAX_WAITING // SHARE_OF_ONE:
            raise self._overloaded()
        of_own = sum(len(waiting.data) for waiting in own)
        if (own and of_own + len(data) > MAX_WAITING_BYTES // SHARE_OF_ONE) or (
            self._num_waiting and self._waiting_bytes + len(data) > MAX_WAITING_BYTES
        ):
            raise self._overloaded()
        if not self._servers:
            self._servers = [asyncio.create_task(self._serve(process)) for process in self.processes]
        waiting = _Waiting(job, opening, data, asyncio.get_running_loop().create_future())
        self._queues.setdefault(principal, collections.deque()).append(waiting)
        self._num_waiting += 1
        self._waiting_bytes += len(data)
        self._arrived.set()
        return await waiting.answer

    def _overloaded(self) -> OverloadedError:
        return OverloadedError(
            f"{self._num_waiting} requests wait for their {self._name.value} texts to be read; try again shortly.",
            retry_after_s=1.0,
        )

    async def stop(self) -> None:
        self._stopped = True
        for server in self._servers:
            server.cancel()
        await asyncio.gather(*self._servers, return_exceptions=True)
        for process in self.processes:
            process.end()
        while (waiting := self._next()) is not None:
            waiting.answer.set_exception(UnavailableError("This neuron is shutting down.", retry_after_s=1.0))

    def _next(self) -> _Waiting | None:
        """Take the next job that a caller still waits for, of the next principal in rotation."""
        while self._queues:
            principal, queue = next(iter(self._queues.items()))
            waiting = queue.popleft()
            self._num_waiting -= 1
            self._waiting_bytes -= len(waiting.data)
            if queue:
                self._queues.move_to_end(principal)
            else:
                del self._queues[principal]
            if not waiting.answer.done():
                return waiting
        return None

    async def _serve(self, process: TextProcess) -> None:
        while True:
            waiting = self._next()
            if waiting is None:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            try:
                answer = await self._do(process, waiting)
            except ApiError as error:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            except asyncio.CancelledError:
                if not waiting.answer.done():
                    waiting.answer.set_exception(UnavailableError("This neuron is shutting down.", retry_after_s=1.0))
                raise
            except Exception as error:
                logger.exception("%s: a job failed", process.name)
                if not waiting.answer.done():
                    waiting.answer.set_exception(UnavailableError(f"The text could not be read: {error}."))
            else:
                if not waiting.answer.done():
                    waiting.answer.set_result(answer)
            del waiting
            if self._name is QueueName.FILES:
                process.end()  # with all the memory that reading them has taken

    async def _do(self, process: TextProcess, waiting: _Waiting) -> jobs.FromText:
        job = waiting.job
        while True:
            try:
                self._check_open(job.model)
                if not isinstance(job, jobs.Open):
                    await process.open(waiting.opening)
                    self._check_open(job.model, process)
                answer = await process.ask(waiting.data, job.limits)
            except Death as death:
                waiting.tries += 1
                if death.is_of_the_job or waiting.tries == MAX_TRIES:
                    logger.warning("%s: ended over a job: %s", process.name, death)
                    raise error_of(job, death) from None
                logger.warning("%s: lost: %s; the job is tried again", process.name, death)
                continue
            if isinstance(answer, jobs.Refused):
                raise RemoteError(answer.error)
            if isinstance(job, jobs.Open):
                process.opened.add(job.model)
                self._check_open(job.model, process)
            return answer

    def _check_open(self, model: int, process: TextProcess | None = None) -> None:
        """Raise for a model that was closed in the meantime, which ``process`` is to forget."""
        if model not in self._open:
            if process is not None:
                process.forget(model)
            raise UnavailableError("The model was unloaded.", retry_after_s=1.0)


def error_of(job: jobs.Job, death: Death) -> ApiError:
    """Return the error of ``job`` after the death of its process."""
    if isinstance(job, jobs.Open):
        if death.step is Step.TEMPLATE:
            return TemplateError(f"The model's chat template {death}.")
        return UnsupportedTokenizerError(f"Reading the model's tokenizer {death}.")
    if isinstance(job, jobs.Check | jobs.Ask):
        return InvalidSchemaError(f"compiling it {death}", param=param_of_grammar(job.request))
    if isinstance(job, jobs.Tokenise):
        return PromptTooCostlyError(f"Making tokens of the input {death}.", param="input")
    if job.request.prompt is None and death.step is not Step.TOKENS:
        return TemplateError(f"The model's chat template {death}.", param="messages")
    param = "messages" if job.request.prompt is None else "prompt"
    return PromptTooCostlyError(f"Making tokens of the prompt {death}.", param=param)

"""The harness that ships: models under torch in this project's device workers, text handled here.

Prompts are rendered and tokenised in the daemon's text processes, token ids run through the worker, and ids become
events here again. This module imports no torch; only the worker processes do.
"""

import array
import asyncio
import dataclasses
import functools
import pathlib
import secrets
import socket
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence

import msgspec

from cortex.wire.errors import (
    ApiError,
    ContextLengthError,
    InvalidRequestError,
    UnprocessableError,
    UnsupportedParameterError,
)
from cortex.wire.events import Failed, InferenceEvent, PromptEcho, Started, TokenLogprob
from cortex.wire.node import Capability, ModelSpec
from cortex.wire.request import EmbeddingRequest, FormatKind, InferenceRequest, Sampling, ToolMode
from neuron.config import PrefixSharing
from neuron.device.jobs import (
    ConstraintSettings,
    Embedding,
    GroupSettings,
    LoadedModel,
    SamplerSettings,
    SequenceEnd,
    TokenLogprobs,
    TokenRow,
)
from neuron.device.worker import Item, Sink, Worker
from neuron.errors import AnswerCutError, NoDeviceError
from neuron.harness import Embeddings, Model, Progress, Requirement
from neuron.models.config import GenerationDefaults, ModelConfig, read_config
from neuron.models.shard import Shard
from neuron.models.sizing import least_bytes, plan_memory
from neuron.text.detokenize import Detokenizer
from neuron.text.jobs import Built
from neuron.text.pool import TextModel, TextPool

ID_BYTES = 4
"""Of a token's id in a prompt."""

RETRY_AFTER_S = 2.0

NEVER = -1e4
"""Added to the logit of a token that is not to be said."""

_SEED_MASK = (1 << 62) - 1


class TorchHarness:
    """Owns no processes: the workers are the service's, one for each device, and so are those for text."""

    name = "torch"

    def __init__(
        self,
        workers: Mapping[str, Worker],
        texts: TextPool,
        collective_limit_s: float = 30.0,
        prefix_sharing: PrefixSharing = PrefixSharing.PRINCIPAL,
        *,
        cpu_kernels: bool = True,
    ) -> None:
        """``cpu_kernels`` is that of the workers' engines: their memory plans depend on it."""
        self._cpu_kernels = cpu_kernels
        self._prefix_sharing = prefix_sharing
        self._workers = workers
        self._texts = texts
        self._collective_limit_s = collective_limit_s
        self._groups: dict[str, tuple[str, ...]] = {}
        """The devices of each model that several hold."""

    async def measure(self, spec: ModelSpec, path: pathlib.Path) -> Requirement:
        """Return the least that the worker's own plan takes on each device the spec allows."""
        size = spec.tensor_parallel
        if len(spec.devices) > 1 and len(spec.devices) != size:
            raise UnprocessableError(
                f"'{spec.id}' names {len(spec.devices)} devices, and tensor_parallel is {size}.",
                param="tensor_parallel",
            )
        devices = [worker.device_id for worker in self._candidates(spec)]
        if size != 1:
            devices = _alike(devices, size)
        if not 0 < size <= len(devices):
            raise UnprocessableError(
                f"'{spec.id}' wants {size} devices of one kind; it may have: {', '.join(devices) or 'none'}.",
                param="tensor_parallel",
            )
        config, draft = await _read_configs(spec, path)
        shards = [Shard(rank, size) for rank in range(size)]
        least = {
            device: max(
                least_bytes(config, spec, device, shard, draft, cpu_kernels=self._cpu_kernels) for shard in shards
            )
            for device in devices
        }
        return Requirement(least, size)

    async def free_bytes(self, devices: Collection[str]) -> dict[str, int]:
        """Ask the workers of ``devices`` that are there."""
        # A worker that recovers takes jobs before it takes sequences: its models are loaded again that way.
        ready = [device for device in devices if self._workers[device].ready is not None]
        memory = await asyncio.gather(*(self._workers[device].memory() for device in ready))
        return {device: answer.free_bytes for device, answer in zip(ready, memory, strict=True)}

    async def load(self, spec: ModelSpec, path: pathlib.Path, progress: Progress) -> "TorchModel":
        """Load the weights at ``path`` on the devices the spec names, or on those with the most free memory."""
        config, draft = await _read_configs(spec, path)
        # The text side comes first: it is what fails without a device having anything to undo.
        text = await self._texts.open(str(path), config.vocab_size, config.eos_ids, spec.special_tokens_in_text)
        try:
            if draft is not None:
                await self._check_draft(spec, draft, text)
            loaded, workers = await self._load_weights(spec, path, progress, config, draft)
            try:
                generation = config.generation.under(spec.sampling)
                config = dataclasses.replace(config, generation=generation)
                return TorchModel(loaded, config, text, workers, self._prefix_sharing)
            except BaseException:
                await self._undo(spec.id, workers)
                raise
        except BaseException:
            text.close()
            raise

    async def _check_draft(self, spec: ModelSpec, draft: ModelConfig, text: TextModel) -> None:
        """Raise unless the draft model has the vocabulary of its target."""
        other = await self._texts.open(spec.draft, draft.vocab_size, draft.eos_ids)
        other.close()
        if other.vocabulary_digest != text.vocabulary_digest:
            raise UnprocessableError(
                f"'{spec.draft}' has another vocabulary than '{spec.id}', so it cannot be its draft model.",
                param="draft",
            )

    async def _load_weights(
        self,
        spec: ModelSpec,
        path: pathlib.Path,
        progress: Progress,
        config: ModelConfig,
        draft: ModelConfig | None,
    ) -> tuple[LoadedModel, tuple[Worker, ...]]:
        """Load on the devices; return what became of it, and the workers that have it, rank 0 first."""
        size = spec.tensor_parallel
        chosen = await self._choose(spec)
        for rank, (worker, free_bytes) in enumerate(chosen):
            shard = Shard(rank, size)
            plan_memory(config, spec, worker.device_id, free_bytes, shard, draft, cpu_kernels=self._cpu_kernels)
        workers = tuple(worker for worker, _ in chosen)
        if size == 1:
            return await self._load_alone(workers[0], spec, path, progress), workers
        return await self._load_group(workers, spec, path, progress), workers

    async def unload(self, model: Model) -> None:
        """Free a model's memory on its devices."""
        assert isinstance(model, TorchModel)
        self._groups.pop(model.loaded.model, None)
        model.text.close()
        await asyncio.gather(*(worker.unload(model.loaded.model) for worker in model.workers))

    async def _undo(self, name: str, workers: Sequence[Worker]) -> None:
        """Free what a load that failed has left on ``workers``, also if whoever waits for it is cancelled meanwhile."""
        self._groups.pop(name, None)
        unloads = asyncio.gather(*(worker.unload(name) for worker in workers), return_exceptions=True)
        await asyncio.shield(unloads)

    async def _load_alone(self, worker: Worker, spec: ModelSpec, path: pathlib.Path, progress: Progress) -> LoadedModel:
        """Load all of it on one worker; a load nobody waits for any more is undone there."""
        try:
            return await worker.load(spec, str(path), progress=progress)
        except asyncio.CancelledError:
            await self._undo(spec.id, [worker])
            raise

    async def _load_group(
        self, workers: tuple[Worker, ...], spec: ModelSpec, path: pathlib.Path, progress: Progress
    ) -> LoadedModel:
        """Load a part on each worker; what a load that fails somewhere leaves elsewhere is undone."""
        devices = tuple(worker.device_id for worker in workers)
        for name, others in self._groups.items():
            if name != spec.id and others != devices and set(others) & set(devices):
                # Two steps that wait for each other's devices would wait for ever.
                raise UnprocessableError(
                    f"'{spec.id}' would run on {', '.join(devices)}, and '{name}' runs on {', '.join(others)}: models "
                    "that share devices must share all of them.",
                    param="devices",
                )
        self._groups[spec.id] = devices
        address = f"127.0.0.1:{_free_port()}"
        loads = [
            asyncio.create_task(
                worker.load(
                    spec,
                    str(path),
                    progress=None if rank else progress,
                    group=GroupSettings(rank, len(workers), address, self._collective_limit_s),
                )
            )
            for rank, worker in enumerate(workers)
        ]
        undone = workers
        try:
            await asyncio.wait(loads, return_when=asyncio.FIRST_EXCEPTION)
            failed = next((load for load in loads if load.done() and load.exception()), None)
            if failed is not None:
                # The others fail in turn, or load a part that is of no use: nobody waits for the end of that.
                await asyncio.wait(loads, timeout=self._collective_limit_s)
                undone = tuple(
                    worker
                    for worker, load in zip(workers, loads, strict=True)
                    if not load.done() or load.exception() is None
                )
                failed.result()
            parts = [load.result() for load in loads]
        except BaseException:
            for load in loads:
                load.cancel()
            await self._undo(spec.id, undone)
            raise
        return msgspec.structs.replace(
            parts[0],
            weights_bytes=sum(part.weights_bytes for part in parts),
            kv_cache_bytes=sum(part.kv_cache_bytes for part in parts),
        )

    def _candidates(self, spec: ModelSpec) -> list[Worker]:
        for device in spec.devices:
            if device not in self._workers:
                known = ", ".join(self._workers) or "none"
                raise NoDeviceError(f"'{device}' is not a device of this neuron; it has: {known}.", param="devices")
        return [worker for device, worker in self._workers.items() if device in (spec.devices or self._workers)]

    async def _choose(self, spec: ModelSpec) -> list[tuple[Worker, int]]:
        """Return the workers to load on, rank 0 first, and the free bytes of each."""
        candidates = self._candidates(spec)
        free_bytes = await self.free_bytes([worker.device_id for worker in candidates])
        if len(free_bytes) < spec.tensor_parallel:
            states = ", ".join(f"{worker.device_id} is {worker.state}" for worker in candidates) or "there are none"
            wants = f"'{spec.id}' wants {spec.tensor_parallel} devices" if spec.tensor_parallel > 1 else ""
            raise NoDeviceError(f"{wants or f'No device can take {spec.id!r}'}: {states}.", retry_after_s=RETRY_AFTER_S)
        roomiest = sorted(free_bytes, key=lambda device: -free_bytes[device])[: spec.tensor_parallel]
        # Ranks are in the order of devices, so that groups of the same devices have the same rank 0.
        return [(worker, free_bytes[device]) for device, worker in self._workers.items() if device in roomiest]


class TorchModel:
    """A model loaded in a device worker, with the text side that belongs to it."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: ModelConfig,
        text: TextModel,
        workers: tuple[Worker, ...],
        prefix_sharing: PrefixSharing = PrefixSharing.PRINCIPAL,
    ) -> None:
        self.loaded = loaded
        self._prefix_sharing = prefix_sharing
        self.text = text
        self.workers = workers
        self.worker = workers[0]
        """Rank 0, which takes the sequences."""
        self._config = config

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices it lives on, one for each rank."""
        return tuple(worker.device_id for worker in self.workers)

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What its template and tokenizer allow, and what it was made for."""
        if not self._config.generates:
            return (Capability.EMBEDDINGS,)
        if not self.text.can_chat:
            return (Capability.COMPLETION, Capability.EMBEDDINGS)
        found = [Capability.COMPLETION, Capability.EMBEDDINGS, Capability.CHAT, Capability.TOOLS]
        if self.text.tags is not None:
            found.append(Capability.REASONING)
        return tuple(found)

    async def count_tokens(self, request: InferenceRequest) -> int:
        """Count the tokens of a prompt made as :meth:`infer` makes it; one too long for the context has a count too."""
        return await self.text.count(request, self.loaded.context_tokens)

    async def left_out(self, request: InferenceRequest) -> Sequence[str]:
        """Ask a text process; see :class:`neuron.harness.Model`."""
        return await self.text.left_out(request)

    async def infer(self, request: InferenceRequest) -> AsyncGenerator[Sequence[InferenceEvent], None]:
        """Run a request; see :class:`neuron.harness.Model`."""
        if not self._config.generates:
            raise UnprocessableError(f"'{request.model}' makes embeddings and writes no text.", param="model")
        if isinstance(request.prompt, tuple) and len(request.prompt) >= self.loaded.context_tokens:
            # Nothing needs to read them to know.
            raise ContextLengthError(self.loaded.context_tokens, len(request.prompt), param="prompt")
        prompt = await self.text.build(request, self.loaded.context_tokens)
        constraint = await self._constraint(request, prompt)
        run = _Run(
            self.worker,
            self.text.text_of,
            [self._detokenizer(request, prompt, choice) for choice in range(request.num_choices)],
            self._echo(request, prompt) if request.echo else None,
            says_nothing=request.max_tokens == 0,
        )
        try:
            try:
                self._start(run, request, prompt, constraint)
            except OverflowError:
                raise InvalidRequestError("Invalid value: a number of the request has no use at that size.") from None
            async for events in run.events(len(prompt.ids) // ID_BYTES):
                yield events
        finally:
            run.cancel()

    def _echo(self, request: InferenceRequest, prompt: Built) -> "_Echo":
        text = request.prompt
        if not isinstance(text, str):
            text = self.text.tokenizer.decode(text or (), skip_special_tokens=False)
        return _Echo(text, array.array("i", prompt.ids), request.top_logprobs is not None)

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Embed each input as a sequence of its own; see :class:`neuron.harness.Model`."""
        size = self._config.hidden_size
        if request.dimensions not in {None, size}:
            raise UnsupportedParameterError(
                f"'{self.loaded.model}' was not trained to have its embeddings cut: 'dimensions' can be {size} only.",
                param="dimensions",
            )
        context = self.loaded.context_tokens
        texts = [given for given in request.inputs if isinstance(given, str)]
        made = iter(await self.text.tokenise(texts, context, request.principal) if texts else ())
        prompts = [next(made) if isinstance(given, str) else _ids_given(given) for given in request.inputs]
        for index, ids in enumerate(prompts):
            if len(ids) >= context * ID_BYTES:
                raise ContextLengthError(context, len(ids) // ID_BYTES, param=f"input[{index}]")
        # Not all at once: the queue is everyone's.
        slots = asyncio.Semaphore(self.loaded.max_sequences)
        tasks = [asyncio.create_task(self._embed(ids, request, slots)) for ids in prompts]
        try:
            vectors = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return Embeddings(tuple(vectors), sum(map(len, prompts)) // ID_BYTES)

    async def _embed(self, prompt: bytes, request: EmbeddingRequest, slots: asyncio.Semaphore) -> bytes:
        async with slots:
            answer: asyncio.Future[Item] = asyncio.get_running_loop().create_future()

            def sink(item: Item) -> None:
                if not answer.done():
                    answer.set_result(item)

            sequence = self.worker.embed(
                self.loaded.model,
                prompt,
                self._config.pooling,
                sink,
                principal=request.principal,
                priority=request.priority,
                cache_salt=self._prefix_sharing.salt(request.principal),
            )
            try:
                item = await answer
            except asyncio.CancelledError:
                self.worker.cancel(sequence)
                raise
        if isinstance(item, ApiError):
            raise item
        if isinstance(item, TokenRow):  # an embedding has none, but for the end that nobody here asked for
            raise AnswerCutError
        assert isinstance(item, Embedding)
        return item.vector

    def _detokenizer(self, request: InferenceRequest, prompt: Built, choice: int) -> Detokenizer:
        return Detokenizer(
            self.text.tokenizer,
            choice=choice,
            stop=request.stop,
            includes_stop=request.ending.includes_stop,
            tags=self.text.tags if request.prompt is None else None,
            starts_in_reasoning=prompt.starts_in_reasoning,
            tools=request.tools if request.tool_choice.mode is not ToolMode.NONE else (),
            call_form=self.text.call_form,
            markers=self.text.markers,
            parallel_calls=request.tool_choice.parallel,
        )

    async def _constraint(self, request: InferenceRequest, prompt: Built) -> ConstraintSettings | None:
        """Return what the answer must look like, tried in a text process.

        Raises InvalidSchemaError, and UnsupportedParameterError if the tags of reasoning are not tokens of the model.
        """
        if request.output_format.kind is FormatKind.TEXT and request.tool_choice.mode in {ToolMode.AUTO, ToolMode.NONE}:
            return None
        grammar = await self.text.grammar(request)
        tags = self.text.tags if request.prompt is None else None
        if grammar is None or tags is None or prompt.ends_reasoning:
            return None if grammar is None else ConstraintSettings(grammar)
        if self.text.tag_ids is None:
            raise UnsupportedParameterError(
                f"'{self.loaded.model}' reasons in plain text, which no grammar can follow.", param="response_format"
            )
        opens, closes = self.text.tag_ids
        inside = prompt.starts_in_reasoning
        return ConstraintSettings(grammar, -1 if inside else opens, closes, inside)

    def _start(
        self, run: "_Run", request: InferenceRequest, prompt: Built, constraint: ConstraintSettings | None
    ) -> None:
        room = self.loaded.context_tokens - len(prompt.ids) // ID_BYTES
        # Even who wants none has one sampled: that is when the prompt has been read.
        max_tokens = room if request.max_tokens is None else min(max(request.max_tokens, 1), room)
        ending = request.ending
        eos = tuple(sorted({*(() if ending.ignore_eos else self._config.eos_ids), *ending.stop_token_ids}))
        settings = resolve_sampling(request.sampling, self._config.generation)
        if prompt.banned:
            bias = (*settings.logit_bias, *((id, NEVER) for id in prompt.banned))
            settings = msgspec.structs.replace(settings, logit_bias=bias)
        if request.top_logprobs is not None:
            settings = msgspec.structs.replace(settings, top_logprobs=request.top_logprobs)
        for choice in range(request.num_choices):
            sampler = msgspec.structs.replace(settings, seed=(settings.seed + choice) & _SEED_MASK)
            run.start(
                choice,
                functools.partial(
                    self.worker.generate,
                    self.loaded.model,
                    prompt.ids,
                    max_tokens,
                    eos,
                    sampler,
                    principal=request.principal,
                    priority=request.priority,
                    constraint=constraint,
                    min_tokens=ending.min_tokens,
                    cache_salt=self._prefix_sharing.salt(request.principal, request.cache_salt),
                    scores_prompt=request.echo and request.top_logprobs is not None,
                ),
            )


@dataclasses.dataclass(frozen=True, slots=True)
class _Echo:
    """The prompt of a request that wants it told again, and its tokens."""

    text: str
    ids: Sequence[int]
    scores: bool
    """Whether the log probabilities of its tokens are wanted."""


class _Run:
    """The sequences of one request in a worker, one for each choice, and what has come back from them."""

    def __init__(
        self,
        worker: Worker,
        token_text: Callable[[Sequence[int]], list[bytes]],
        choices: list[Detokenizer],
        echo: _Echo | None = None,
        *,
        says_nothing: bool = False,
    ) -> None:
        """With ``says_nothing`` the prompt is read, and its first answer left out."""
        self._worker = worker
        self._token_text = token_text
        self._choices = choices
        self._echo = echo
        self._says_nothing = says_nothing
        self._num_echoed: dict[int, int] = {}
        """How many of the prompt's tokens were scored, for each choice whose prompt is being told."""
        self._sequences: dict[int, int] = {}
        self._arrived: list[tuple[int, Item]] = []
        self._wake = asyncio.Event()

    def start(self, choice: int, generate: Callable[[Sink], int]) -> None:
        """Submit one choice's sequence."""

        def sink(item: Item) -> None:
            self._arrived.append((choice, item))
            self._wake.set()

        self._sequences[choice] = generate(sink)

    async def events(self, prompt_tokens: int) -> AsyncGenerator[list[InferenceEvent], None]:
        """Yield events until every choice has finished, or one has failed."""
        started = False
        while self._sequences:
            await self._wake.wait()
            self._wake.clear()
            arrived, self._arrived = self._arrived, []
            events: list[InferenceEvent] = []
            for choice, item in arrived:
                if choice not in self._sequences:
                    continue  # it ended on a stop string while this row was on its way
                if isinstance(item, TokenRow) and item.end is SequenceEnd.CANCELLED:
                    item = AnswerCutError()  # nobody here asked for it
                if isinstance(item, ApiError):
                    if not started and not events:
                        raise item
                    yield [*events, Failed(item.info())]
                    return
                assert isinstance(item, TokenRow)
                if not started:
                    events.append(Started(prompt_tokens, item.prompt_cached or 0))
                    started = True
                events += self._feed(choice, item)
            if events:
                yield events

    def cancel(self) -> None:
        """Free whatever still runs."""
        for sequence in self._sequences.values():
            self._worker.cancel(sequence)
        self._sequences.clear()

    def _feed(self, choice: int, row: TokenRow) -> list[InferenceEvent]:
        events: list[InferenceEvent] = []
        if self._echo is not None:
            events += self._echo_events(choice, row, self._echo)
        if not row.ids and row.end is None:
            return events  # its prompt is still being read
        if self._says_nothing:
            row = TokenRow(row.sequence, b"", SequenceEnd.LENGTH)
        text = self._choices[choice]
        events += text.feed(array.array("i", row.ids), self._logprobs(row))
        if row.end is not None:
            events += text.close(row.end)
            del self._sequences[choice]
        elif text.finished:
            self._worker.cancel(self._sequences.pop(choice))
        return events

    def _echo_events(self, choice: int, row: TokenRow, echo: _Echo) -> list[InferenceEvent]:
        """Return the prompt as far as a row brings it: its text first, then its scores as they come.

        All at once they would hold up everybody else's answers.
        """
        begins = choice not in self._num_echoed
        scores: list[TokenLogprob] = []
        if begins and echo.scores:
            scores.append(_logprob(self._token_text(echo.ids[:1])[0], 0.0))  # which has nothing before it
        if row.prompt is not None:
            first = self._num_echoed.get(choice, 1)
            scores += self._named(echo.ids[first : first + len(row.prompt.chosen) // 4], row.prompt)
        self._num_echoed[choice] = self._num_echoed.get(choice, 0) + len(scores)
        return [PromptEcho(echo.text if begins else "", choice, tuple(scores))] if begins or scores else []

    def _logprobs(self, row: TokenRow) -> list[TokenLogprob]:
        return [] if row.logprobs is None else self._named(array.array("i", row.ids), row.logprobs)

    def _named(self, ids: Sequence[int], found: TokenLogprobs) -> list[TokenLogprob]:
        """Return the log probabilities of ``ids``, with the bytes of all tokens."""
        chosen = array.array("f", found.chosen)
        top_ids, top = array.array("i", found.top_ids), array.array("f", found.top)
        width = len(top_ids) // max(1, len(ids))
        others = [_logprob(*pair) for pair in zip(self._token_text(top_ids), top, strict=True)]
        return [
            _logprob(text, value, tuple(others[index * width : (index + 1) * width]))
            for index, (text, value) in enumerate(zip(self._token_text(ids), chosen, strict=True))
        ]


def _ids_given(ids: Sequence[int]) -> bytes:
    try:
        return array.array("i", ids).tobytes()
    except OverflowError:
        raise InvalidRequestError("Invalid 'input': it holds a token that no model has.", param="input") from None


def _logprob(utf8: bytes, value: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    return TokenLogprob(utf8.decode(errors="replace"), utf8, value, top)


def _alike(devices: Sequence[str], size: int) -> list[str]:
    """Return those of ``devices`` that are of one kind, of GPUs if there are ``size``: no sum goes over both."""
    kinds: dict[str, list[str]] = {"cuda": [], "cpu": []}
    for device in devices:
        kinds[device.partition(":")[0]].append(device)
    return max(kinds.values(), key=lambda found: min(len(found), size))


def _free_port() -> int:
    """Return a port where the ranks of a group can meet; it was free a moment ago."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


async def _read_configs(spec: ModelSpec, path: pathlib.Path) -> tuple[ModelConfig, ModelConfig | None]:
    """Read the configuration of a model, and of its draft model."""
    if spec.draft and spec.tensor_parallel != 1:
        raise UnprocessableError(
            f"'{spec.id}' is on several devices, where draft models are not supported.", param="draft"
        )
    draft = await asyncio.to_thread(read_config, pathlib.Path(spec.draft)) if spec.draft else None
    return await asyncio.to_thread(read_config, path), draft


def resolve_sampling(asked: Sampling, defaults: GenerationDefaults) -> SamplerSettings:
    """Fill in what a request left open from the model's own generation config; without one, plain sampling."""

    def pick(name: str, otherwise: float) -> float:
        for value in (getattr(asked, name), getattr(defaults, name, None)):
            if value is not None:
                return float(value)
        return otherwise

    return SamplerSettings(
        temperature=pick("temperature", 1.0),
        top_k=max(0, int(pick("top_k", 0))),
        top_p=pick("top_p", 1.0),
        min_p=pick("min_p", 0.0),
        repetition_penalty=pick("repetition_penalty", 1.0),
        presence_penalty=pick("presence_penalty", 0.0),
        frequency_penalty=pick("frequency_penalty", 0.0),
        logit_bias=tuple(asked.logit_bias.items()),
        seed=(secrets.randbits(62) if asked.seed is None else asked.seed) & _SEED_MASK,
    )

"""A loaded model and its text side: requests become sequences of a device worker, token ids become events.

Prompts are rendered and tokenised in the daemon's text processes. No torch here; only the worker processes import it.
"""

import array
import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence

import msgspec

from cortex.wire.errors import (
    ApiError,
    ContextLengthError,
    InvalidRequestError,
    UnprocessableError,
    UnsupportedParameterError,
)
from cortex.wire.events import InferenceEvent
from cortex.wire.node import Capability
from cortex.wire.request import EmbeddingRequest, FormatKind, InferenceRequest, Sampling, ToolMode
from neuron.config import PrefixSharing
from neuron.device.jobs import (
    UNNUMBERED,
    ConstraintSettings,
    Embed,
    Embedding,
    Generate,
    LoadedModel,
    SamplerSettings,
    ThinkingSettings,
    TokenRow,
)
from neuron.device.outstanding import Item
from neuron.device.worker import Worker
from neuron.errors import AnswerCutError
from neuron.generation import EchoedPrompt, Generation
from neuron.harness import Embeddings
from neuron.models.model import GenerationDefaults, ModelConfig
from neuron.text.detokenize import Detokenizer
from neuron.text.jobs import Built
from neuron.text.pool import TextModel

ID_BYTES = 4
"""Bytes of a token id in a prompt."""

NEVER = -1e4
"""Added to the logit of a banned token."""

_SEED_MASK = (1 << 62) - 1


class TorchModel:
    """A model loaded in a device worker, with its text side."""

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
        """Devices of the model, one for each rank."""
        return tuple(worker.device_id for worker in self.workers)

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """Capabilities of the model, by its architecture, template and tokenizer."""
        if not self._config.generates:
            return (Capability.EMBEDDINGS,)
        if not self.text.can_chat:
            return (Capability.COMPLETION, Capability.EMBEDDINGS)
        found = [Capability.COMPLETION, Capability.EMBEDDINGS, Capability.CHAT, Capability.TOOLS]
        if self.text.tags is not None:
            found.append(Capability.REASONING)
        return tuple(found)

    async def count_tokens(self, request: InferenceRequest) -> int:
        """Count the tokens of the prompt that :meth:`infer` makes, even of one too long for the context."""
        return await self.text.count(request, self.loaded.context_tokens)

    async def left_out(self, request: InferenceRequest) -> Sequence[str]:
        """Ask a text process; see :class:`neuron.harness.Model`."""
        return await self.text.left_out(request)

    async def infer(self, request: InferenceRequest) -> AsyncGenerator[Sequence[InferenceEvent], None]:
        """Run a request; see :class:`neuron.harness.Model`."""
        if not self._config.generates:
            raise UnprocessableError(f"'{request.model}' makes embeddings and writes no text.", param="model")
        if isinstance(request.prompt, tuple) and len(request.prompt) >= self.loaded.context_tokens:
            # Known without reading the tokens.
            raise ContextLengthError(self.loaded.context_tokens, len(request.prompt), param="prompt")
        prompt = await self.text.build(request, self.loaded.context_tokens)
        constraint, thinking = await self._constraint(request, prompt), self._thinking(request, prompt)
        run = Generation(
            self.worker,
            self.text.text_of,
            [self._detokenizer(request, prompt, choice) for choice in range(request.num_choices)],
            self._echo(request, prompt) if request.echo else None,
            is_empty=request.max_tokens == 0,
        )
        try:
            try:
                self._start(run, request, prompt, constraint, thinking)
            except OverflowError:
                raise InvalidRequestError("Invalid value: a number of the request is out of range.") from None
            async for events in run.events(len(prompt.ids) // ID_BYTES):
                yield events
        finally:
            run.cancel()

    def _echo(self, request: InferenceRequest, prompt: Built) -> EchoedPrompt:
        text = request.prompt
        if not isinstance(text, str):
            text = self.text.tokenizer.decode(text or (), skip_special_tokens=False)
        return EchoedPrompt(text, array.array("i", prompt.ids), request.top_logprobs is not None)

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
        tokenised = iter(await self.text.tokenise(texts, context, request.principal) if texts else ())
        prompts = [next(tokenised) if isinstance(given, str) else _ids_given(given) for given in request.inputs]
        for index, ids in enumerate(prompts):
            if len(ids) >= context * ID_BYTES:
                raise ContextLengthError(context, len(ids) // ID_BYTES, param=f"input[{index}]")
        # Not all at once: the queue is shared with other clients.
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

            salt = self._prefix_sharing.salt(request.principal)
            pooling, principal = self._config.pooling, request.principal
            asked = Embed(UNNUMBERED, self.loaded.model, prompt, pooling, principal, request.priority, salt)
            sequence = self.worker.run(asked, sink)
            try:
                item = await answer
            except asyncio.CancelledError:
                self.worker.cancel(sequence)
                raise
        if isinstance(item, ApiError):
            raise item
        if isinstance(item, TokenRow):  # an embedding has no row but that of a cancellation from elsewhere
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
        """Return the grammar of the answer, tried in a text process.

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

    def _thinking(self, request: InferenceRequest, prompt: Built) -> ThinkingSettings | None:
        """Return the bound on reasoning, of which there may be none.

        Raises UnsupportedParameterError if the tags of reasoning are not tokens of the model.
        """
        is_bound = request.thinking_budget is not None and request.prompt is None and self.text.tags is not None
        if not is_bound or prompt.ends_reasoning or request.thinking_budget is None:
            return None
        if self.text.tag_ids is None:
            raise UnsupportedParameterError(
                f"'{self.loaded.model}' reasons in plain text, which no budget can end.", param="thinking_budget"
            )
        opens, _ = self.text.tag_ids
        return ThinkingSettings(request.thinking_budget, opens, self.text.early_end, prompt.starts_in_reasoning)

    def _start(
        self,
        run: Generation,
        request: InferenceRequest,
        prompt: Built,
        constraint: ConstraintSettings | None,
        thinking: ThinkingSettings | None,
    ) -> None:
        available = self.loaded.context_tokens - len(prompt.ids) // ID_BYTES
        # Even max_tokens 0 samples a token: it marks the end of the prompt.
        max_tokens = available if request.max_tokens is None else min(max(request.max_tokens, 1), available)
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
                Generate(
                    UNNUMBERED,
                    self.loaded.model,
                    prompt.ids,
                    max_tokens,
                    eos,
                    sampler,
                    principal=request.principal,
                    priority=request.priority,
                    constraint=constraint,
                    thinking=thinking,
                    min_tokens=ending.min_tokens,
                    cache_salt=self._prefix_sharing.salt(request.principal, request.cache_salt),
                    scores_prompt=request.echo and request.top_logprobs is not None,
                    breakpoints=prompt.breakpoints,
                ),
            )


def _ids_given(ids: Sequence[int]) -> bytes:
    try:
        return array.array("i", ids).tobytes()
    except OverflowError:
        raise InvalidRequestError("Invalid 'input': it holds a token that no model has.", param="input") from None


def resolve_sampling(asked: Sampling, defaults: GenerationDefaults) -> SamplerSettings:
    """Return the request's sampling, with defaults from the model's generation config, or plain sampling."""

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

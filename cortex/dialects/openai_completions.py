"""OpenAI's older text completions: a body of ``/v1/completions`` to an ``InferenceRequest``, and its answers.

One prompt of text, which no chat template touches; a list of one counts as it. Accepted without effect: ``user``.
Clients of this dialect are few and their streams short: the frames are made here, without Cython. A chunk that is not
the last of its choice has a null ``finish_reason``, as OpenAI's own have, although the type of its SDK knows none.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from cortex.dialects import openai_fields as fields
from cortex.dialects.generation import GenerationBody
from cortex.dialects.openai_errors import error_body
from cortex.dialects.parameters import OPEN_SERVERS, OPEN_SERVERS_WITHOUT_EFFECT, Parameters
from cortex.wire.errors import InvalidRequestError, RemoteError, UpstreamError
from cortex.wire.events import Failed, Finished, FinishReason, InferenceEvent, ReasoningDelta, Started, TextDelta
from cortex.wire.request import InferenceRequest, OutputFormat


class CompletionCall(msgspec.Struct, frozen=True):
    """A decoded call."""

    request: InferenceRequest
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...] = ()
    """The members of the body that nobody knows."""


class _JsonSchema(msgspec.Struct):
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class _ResponseFormat(msgspec.Struct):
    type: str
    json_schema: _JsonSchema | None = None


class CompletionBody(GenerationBody, kw_only=True):
    """A request body, as far as it is read."""

    model: str
    prompt: str | list[str | int | list[int]]
    stream: bool | None = None
    stream_options: fields.StreamOptions | None = None
    max_tokens: int | None = None
    n_predict: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    response_format: _ResponseFormat | None = None
    # known and refused
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | bool | None = None
    suffix: str | None = None


_DECODER = msgspec.json.Decoder(CompletionBody)

PARAMETERS = Parameters(
    CompletionBody,
    without_effect={
        "": "metadata prompt_cache_key service_tier store user " + OPEN_SERVERS_WITHOUT_EFFECT,
        "stream_options": "include_obfuscation",
        "response_format.json_schema": "description",
    },
    refused={name: values for name, values in OPEN_SERVERS.items() if name != "best_of"}
    | {"add_special_tokens": (True,)},
)


def decode(body: bytes) -> CompletionCall:
    """Decode a request body.

    Raises:
        InvalidRequestError: with the parameter at fault; see :meth:`cortex.dialects.parameters.Parameters.decode`.
    """
    parsed, ignored = PARAMETERS.decode(body, _DECODER)
    prompt = parsed.prompt if isinstance(parsed.prompt, str) else _only(parsed.prompt)
    num_choices = fields.in_range("n", parsed.n, 1, 128) or 1
    fields.refuse(
        (
            ("best_of", parsed.best_of is not None and parsed.best_of != num_choices),
            ("echo", bool(parsed.echo)),
            ("logprobs", parsed.logprobs is not None and parsed.logprobs is not False),
            ("suffix", bool(parsed.suffix)),
        )
    )
    limit_name, limit = fields.first_given(("max_tokens", parsed.max_tokens), ("n_predict", parsed.n_predict))
    request = InferenceRequest(
        model=parsed.model,
        prompt=prompt,
        sampling=parsed.sampling(),
        max_tokens=fields.in_range(limit_name, limit, 1, 1 << 31),
        stop=fields.stop_strings(parsed.stop),
        ending=parsed.ending(),
        output_format=parsed.form(_output_format(parsed.response_format), "response_format"),
        num_choices=num_choices,
    )
    include_usage = parsed.stream_options is not None and bool(parsed.stream_options.include_usage)
    return CompletionCall(request, bool(parsed.stream), include_usage, ignored)


def _output_format(body: _ResponseFormat | None) -> OutputFormat:
    if body is None:
        return OutputFormat()
    schema = body.json_schema or _JsonSchema()
    return fields.output_format(body.type, schema.schema, schema.name, "response_format")


def _only(prompts: Sequence[str | int | list[int]]) -> str:
    """Return the one text of a list of prompts."""
    if not prompts:
        raise InvalidRequestError("Invalid 'prompt': it is empty.", param="prompt")
    first = prompts[0]
    if not isinstance(first, str):
        raise InvalidRequestError("Invalid 'prompt': a prompt is text here, not token ids.", param="prompt")
    if len(prompts) > 1:
        raise InvalidRequestError(
            f"Invalid 'prompt': {len(prompts)} prompts; one is taken, and 'n' asks for several answers.", param="prompt"
        )
    return first


class Completion:
    """Makes the frames of one completion, and the whole of it for a request that is not streamed."""

    def __init__(
        self,
        id: str,
        model: str,
        created: int,
        num_choices: int = 1,
        include_usage: bool = False,
        report_usage: bool = False,
    ) -> None:
        self._head = {"id": id, "object": "text_completion", "created": created, "model": model}
        self._include_usage = include_usage
        self._report_usage = report_usage
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._ends: list[Finished | None] = [None] * num_choices
        self._started = Started(0)
        self._failed = False

    def frames(self, events: Sequence[InferenceEvent]) -> bytes:
        """Return the frames of a batch of events; of those after the end there are none."""
        return b"".join([self._frame(event) for event in events])

    def body(self) -> bytes:
        """Return the whole completion. Raises :exc:`UpstreamError` if a choice did not come to its end."""
        if not all(self._ends):
            raise UpstreamError("The inference ended without a reason: its answer is not complete.")
        choices = [
            self._choice(index, "".join(texts), end)
            for index, (texts, end) in enumerate(zip(self._texts, self._ends, strict=True))
        ]
        return msgspec.json.encode(self._head | {"choices": choices, "usage": self._usage()})

    def add(self, events: Sequence[InferenceEvent]) -> None:
        """Take a batch of events. Raises :exc:`RemoteError` for an inference that failed."""
        for event in events:
            if isinstance(event, Failed):
                raise RemoteError(event.error)
        self.frames(events)

    def _frame(self, event: InferenceEvent) -> bytes:
        if self._failed or all(self._ends):
            return b""
        match event:
            case Started():
                self._started = event
            case Failed(error):
                self._failed = True
                return b"data: " + error_body(error) + b"\n\n"
            # Without a template nothing marks reasoning; what a harness takes for it is still what the model wrote.
            case TextDelta(text, choice) | ReasoningDelta(text, choice):
                if text and self._ends[choice] is None:
                    self._texts[choice].append(text)
                    return self._chunk([self._choice(choice, text, None)])
            case Finished(choice=choice) if self._ends[choice] is None:
                self._ends[choice] = event
                return self._chunk([self._choice(choice, "", event)]) + (self._last() if all(self._ends) else b"")
        return b""

    def _last(self) -> bytes:
        usage = self._usage()
        last = self._chunk([], {"usage": usage}) if self._include_usage else b""
        if self._report_usage:
            details = usage.pop("prompt_tokens_details")
            last += b": usage " + msgspec.json.encode(usage | details) + b"\n\n"
        return last + b"data: [DONE]\n\n"

    def _chunk(self, choices: list[Any], more: dict[str, Any] | None = None) -> bytes:
        return b"data: " + msgspec.json.encode(self._head | {"choices": choices} | (more or {})) + b"\n\n"

    def _choice(self, index: int, text: str, end: Finished | None) -> dict[str, Any]:
        reason = (
            None if end is None else FinishReason.LENGTH if end.reason is FinishReason.LENGTH else FinishReason.STOP
        )
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def _usage(self) -> dict[str, Any]:
        output_tokens = sum(end.output_tokens for end in self._ends if end is not None)
        return {
            "prompt_tokens": self._started.prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": self._started.prompt_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": self._started.cached_tokens},
        }

"""A request in any dialect as a chat, and a chat's answer back in that dialect: for nodes that speak chat alone.

The request is decoded by its dialect as a neuron would decode it; one encoder writes the chat. The node's response
becomes inference events (:mod:`cortex._fast.chat_events`), encoded by the same projectors as a neuron's. Parameters
that a chat does not have are refused by name.
"""

import functools
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from cortex._fast.chat_events import ChatEvents
from cortex._fast.messages_stream import MessagesStream
from cortex._fast.responses_stream import ResponsesStream
from cortex.dialects import anthropic_messages, openai_responses
from cortex.dialects.anthropic_messages import MessagesCall
from cortex.dialects.openai_chunks import ChunkReader
from cortex.dialects.openai_responses import ResponsesCall
from cortex.dialects.passthrough import (
    COUNT_TOKENS,
    INPUT_TOKENS,
    MESSAGES,
    NO_CONTEXT,
    RESPONSES,
    Dialect,
    ResponseContext,
)
from cortex.wire.errors import ContextLengthError, ErrorInfo, UpstreamError
from cortex.wire.events import InferenceEvent, Started
from cortex.wire.request import (
    FormatKind,
    ImagePart,
    InferenceRequest,
    MediaPart,
    Message,
    Role,
    TextPart,
    Tool,
    ToolMode,
)


class Projector(Protocol):
    """Encoder of inference events as a dialect's SSE events."""

    def sse_events(self, events: Sequence[InferenceEvent], /) -> bytes:
        """Return the SSE events of a batch of events."""


Make = Callable[[], tuple[Projector, Callable[[], bytes]]]
"""Maker of a response's projector and of the function that then returns the response whole."""


class Reading(NamedTuple):
    """A request, decoded by its dialect."""

    request: InferenceRequest
    stream: bool
    make: Make
    ignored: tuple[str, ...] = ()
    num_omitted: int = 0


class Translation:
    """A request as a chat; decoded on first use, as most nodes need no translation."""

    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read

    @functools.cached_property
    def reading(self) -> Reading:
        """The decoded request. Raises :class:`InvalidRequestError`."""
        return self._read()

    @functools.cached_property
    def _body(self) -> bytes:
        return chat_body(self.reading.request, stream=self.reading.stream)

    def body(self) -> bytes:
        """Return the body of the chat request.

        Raises:
            InvalidRequestError: the request is wrong.
        """
        return self._body

    def begin(self) -> "TranslatedAnswer":
        """Return the reader of a node's response."""
        return TranslatedAnswer(*self.reading.make())


class TranslatedAnswer:
    """Translator of a node's response from chat to the caller's dialect."""

    def __init__(self, projector: Projector, whole: Callable[[], bytes]) -> None:
        self._events = ChatEvents()
        self._projector = projector
        self._whole = whole

    def sse_events(self, data: bytes) -> bytes:
        """Return the SSE events for some bytes of the node's stream. Raises :class:`UpstreamError`."""
        events = self._events.feed(data)
        return self._projector.sse_events(events) if events else b""

    def end(self) -> bytes:
        """Return the SSE events for the end of the node's stream: the last ones, if the terminator was missing."""
        return self._projector.sse_events(self._events.close())

    def whole(self, body: bytes) -> bytes:
        """Return the whole response for a response that is not a stream. Raises :class:`UpstreamError`, RemoteError."""
        self._projector.sse_events(ChunkReader().read_whole(body))
        return self._whole()


def to_chat(dialect: Dialect, body: bytes, context: ResponseContext = NO_CONTEXT, name: str = "") -> Translation | None:
    """Return a request as a chat; ``None`` if its dialect is not translated.

    A response repeats ``context``; answers have ``name`` for the model, unless that is empty.
    """
    if dialect is MESSAGES:
        return Translation(lambda: _read_messages(body, name))
    if dialect is COUNT_TOKENS:
        return Translation(lambda: _read_count(anthropic_messages.decode(body), {}))
    if dialect is INPUT_TOKENS:
        return Translation(lambda: _read_count(openai_responses.decode(body), openai_responses.COUNTED))
    if dialect is RESPONSES:
        return Translation(lambda: _read_responses(body, context, name))
    return None


def _read_messages(body: bytes, name: str) -> Reading:
    call = anthropic_messages.decode(body)

    def make() -> tuple[Projector, Callable[[], bytes]]:
        stream = MessagesStream(f"msg_{secrets.token_hex(12)}", name or call.request.model)
        return stream, stream.message

    return Reading(call.request, call.stream, make, call.ignored, call.num_omitted)


def _read_count(call: MessagesCall | ResponsesCall, extra: dict[str, str]) -> Reading:
    """Return a request for one token: its usage has the engine's count, and the prompt is then cached.

    The answer has the members of ``extra`` beside the count.
    """

    def make() -> tuple[Projector, Callable[[], bytes]]:
        counter = _Count(extra)
        return counter, counter.body

    request = msgspec.structs.replace(call.request, max_tokens=1)
    return Reading(request, False, make, call.ignored, call.num_omitted)


def _read_responses(body: bytes, context: ResponseContext, name: str) -> Reading:
    call = openai_responses.decode(body)
    echo = call.echoed(context)

    def make() -> tuple[Projector, Callable[[], bytes]]:
        stream = ResponsesStream(
            context.id or f"resp_{secrets.token_hex(24)}",
            name or call.request.model,
            int(time.time()),
            echo,
            custom_tools=call.tools.custom,
            namespaces=call.tools.namespaces,
            summarises=call.summarises,
            seals=call.seals,
        )
        return stream, stream.response

    return Reading(call.request, call.stream, make, call.ignored, call.num_omitted)


class _Count:
    """Reader of a response's prompt length."""

    def __init__(self, extra: dict[str, str]) -> None:
        self._extra = extra
        self._tokens = 0

    def sse_events(self, events: Sequence[InferenceEvent], /) -> bytes:
        """Read a batch of events."""
        for event in events:
            if isinstance(event, Started):
                self._tokens = event.prompt_tokens
        return b""

    def body(self) -> bytes:
        """Return the response. Raises :class:`UpstreamError` if the node did not report the count."""
        if not self._tokens:
            raise UpstreamError("The node does not say how many tokens a prompt has.")
        return msgspec.json.encode({**self._extra, "input_tokens": self._tokens})


def translated_error(error: ErrorInfo) -> ErrorInfo:
    """Return another server's error, with our code if its message is about a prompt that is too long."""
    lengths = _TOO_LONG.search(error.message)
    if lengths is None:
        return error
    context, prompt = lengths["context"], lengths["prompt"]
    return msgspec.structs.replace(
        error,
        status=ContextLengthError.status,
        code=ContextLengthError.code,
        context_tokens=int(context or 0),
        prompt_tokens=int(prompt or 0),
    )


_TOO_LONG = re.compile(
    r"maximum context length(?: is (?P<context>\d{1,9}) tokens)?(?:\D{1,200}(?P<prompt>\d{1,9})(?!\d))?"
    r"|exceeds the available context size"
)


# ------------------------------------------------------------------ the request, written as a chat


def chat_body(request: InferenceRequest, *, stream: bool) -> bytes:
    """Return ``request`` as a body of ``/v1/chat/completions``. System messages are one, at the front."""
    system = "\n\n".join(_plain(message) for message in request.messages if message.role is Role.SYSTEM)
    messages = [_message(message) for message in request.messages if message.role is not Role.SYSTEM]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    sampling = request.sampling
    optional = {
        "max_tokens": request.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": sampling.seed,
        "stop": list(request.stop) or None,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
        "bad_words": list(sampling.bad_words) or None,
        "ignore_eos": request.ending.ignore_eos or None,
        "stop_token_ids": list(request.ending.stop_token_ids) or None,
        "min_tokens": request.ending.min_tokens or None,
        "include_stop_str_in_output": request.ending.includes_stop or None,
        "structured_outputs": _structured_outputs(request),
        "n": request.num_choices if request.num_choices > 1 else None,
        "response_format": _response_format(request),
        "chat_template_kwargs": _template_arguments(request),
        "thinking_budget": request.thinking_budget,
    }
    body: dict[str, Any] = {"model": request.model, "messages": messages}
    body |= {name: value for name, value in optional.items() if value is not None}
    if request.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    if request.tools:
        body |= {"tools": [_tool(tool) for tool in request.tools], "tool_choice": _tool_choice(request)}
        if not request.tool_choice.parallel:
            body["parallel_tool_calls"] = False
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return msgspec.json.encode(body)


def _message(message: Message) -> dict[str, Any]:
    encoded: dict[str, Any] = {"role": str(message.role), "content": _content(message)}
    if message.tool_calls:
        encoded["content"] = encoded["content"] or None
        encoded["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        encoded["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        encoded["name"] = message.name
    if message.reasoning is not None:
        encoded["reasoning_content"] = encoded["reasoning"] = (
            message.reasoning
        )  # newer servers read the shorter name alone
    return encoded


def _content(message: Message) -> str | list[dict[str, Any]]:
    if isinstance(message.content, str):
        return message.content
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, MediaPart):
            continue  # there is none behind a decoder
        if isinstance(part, ImagePart):
            parts.append({"type": "image_url", "image_url": {"url": part.url, "detail": part.detail}})
        else:
            parts.append({"type": "text", "text": part.text})
    return parts


def _plain(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content if isinstance(part, TextPart))


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(request: InferenceRequest) -> str | dict[str, Any]:
    choice = request.tool_choice
    if choice.mode is ToolMode.NAMED:
        return {"type": "function", "function": {"name": choice.name}}
    return str(choice.mode)


def _response_format(request: InferenceRequest) -> dict[str, Any] | None:
    asked = request.output_format
    if asked.kind is FormatKind.JSON_OBJECT:
        return {"type": "json_object"}
    if asked.kind is FormatKind.JSON_SCHEMA:
        schema: dict[str, Any] = {"name": asked.name or "answer", "schema": msgspec.Raw(asked.source.encode())}
        if asked.strict is not None:
            schema["strict"] = asked.strict
        return {"type": "json_schema", "json_schema": schema}
    return None


def _structured_outputs(request: InferenceRequest) -> dict[str, str] | None:
    """Return the parameters that OpenAI does not have, in vLLM's form."""
    asked = request.output_format
    return {str(asked.kind): asked.source} if asked.kind in {FormatKind.REGEX, FormatKind.GRAMMAR} else None


def _template_arguments(request: InferenceRequest) -> dict[str, Any] | None:
    """Return ``chat_template_kwargs``, whether to think among them."""
    arguments = dict(request.template_arguments)
    if request.thinking is not None:
        arguments.setdefault("enable_thinking", request.thinking)
    if request.effort:
        arguments.setdefault("reasoning_effort", request.effort)
    return arguments or None

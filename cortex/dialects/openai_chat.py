"""OpenAI Chat Completions: a body of ``/v1/chat/completions`` to an ``InferenceRequest``.

Its answers are made by :mod:`cortex._fast.chat_stream` and :mod:`cortex.dialects.openai_chat_reply`. Accepted without
effect: ``user``, ``metadata``, ``store``, ``service_tier``, ``prompt_cache_key``, ``safety_identifier``, ``verbosity``,
and tools that are no functions (``web_search``, ``custom``, ...), which clients send to every server: the model is
offered the others.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from cortex.dialects import openai_fields as fields
from cortex.dialects.answered_calls import OpenCalls
from cortex.wire.errors import InvalidRequestError, MissingParameterError, ToolCallNotFoundError
from cortex.wire.request import (
    InferenceRequest,
    Message,
    OutputFormat,
    Part,
    Role,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
)


class ChatCall(msgspec.Struct, frozen=True):
    """A decoded call: what is asked of the model, and how the client wants it told."""

    request: InferenceRequest
    stream: bool
    include_usage: bool


class _TextBody(msgspec.Struct, tag="text"):
    text: str


class _RefusalBody(msgspec.Struct, tag="refusal"):
    refusal: str


class _ImageAddress(msgspec.Struct):
    url: str
    detail: str | None = None


class _ImageBody(msgspec.Struct, tag="image_url"):
    image_url: _ImageAddress


class _CalledFunction(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = "{}"


class _ToolCallBody(msgspec.Struct):
    id: str
    function: _CalledFunction
    type: Literal["function"] = "function"


class _MessageBody(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_TextBody | _RefusalBody | _ImageBody] | None = None
    name: str | None = None
    tool_calls: list[_ToolCallBody] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class _ToolBody(msgspec.Struct):
    function: fields.FunctionBody | None = None
    type: str = "function"


class _NamedFunction(msgspec.Struct):
    name: str


class _NamedTool(msgspec.Struct):
    function: _NamedFunction
    type: Literal["function"] = "function"


class _JsonSchema(msgspec.Struct):
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class _ResponseFormat(msgspec.Struct):
    type: str
    json_schema: _JsonSchema | None = None


class ChatBody(fields.SamplingBody, kw_only=True):
    """A request body, as far as it is read."""

    model: str
    messages: list[_MessageBody]
    stream: bool | None = None
    stream_options: fields.StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[_ToolBody] | None = None
    tool_choice: Literal["auto", "none", "required"] | _NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: _ResponseFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    ignore_eos: bool | None = None
    # known and refused
    modalities: list[str] | None = None
    audio: object = None
    prediction: object = None
    web_search_options: object = None
    functions: object = None
    function_call: object = None


_DECODER = msgspec.json.Decoder(ChatBody)


def decode(body: bytes) -> ChatCall:
    """Decode a request body.

    Raises:
        InvalidRequestError: with the parameter at fault; see :func:`cortex.dialects.openai_fields.decode`.
    """
    parsed = fields.decode(body, _DECODER)
    if not parsed.messages:
        raise InvalidRequestError("Invalid 'messages': at least one message is needed.", param="messages")
    fields.refuse(
        (
            ("modalities", parsed.modalities is not None and parsed.modalities != ["text"]),
            ("audio", parsed.audio is not None),
            ("prediction", parsed.prediction is not None),
            ("web_search_options", parsed.web_search_options is not None),
            ("functions", parsed.functions is not None),
            ("function_call", parsed.function_call is not None),
        )
    )
    limit_name = "max_tokens" if parsed.max_completion_tokens is None else "max_completion_tokens"
    limit = parsed.max_tokens if parsed.max_completion_tokens is None else parsed.max_completion_tokens
    wants_logprobs = bool(parsed.logprobs)
    if parsed.top_logprobs is not None and not wants_logprobs:
        raise InvalidRequestError("Invalid 'top_logprobs': it needs 'logprobs' to be true.", param="top_logprobs")
    tools = tuple(_tools(parsed.tools or ()))
    request = InferenceRequest(
        model=parsed.model,
        messages=_messages(parsed.messages),
        tools=tools,
        tool_choice=_tool_choice(parsed, tools),
        sampling=parsed.sampling(),
        max_tokens=fields.in_range(limit_name, limit, 1, 1 << 31),
        stop=fields.stop_strings(parsed.stop),
        ignore_eos=bool(parsed.ignore_eos),
        num_choices=fields.in_range("n", parsed.n, 1, 128) or 1,
        top_logprobs=fields.in_range("top_logprobs", parsed.top_logprobs or 0, 0, 20) if wants_logprobs else None,
        output_format=_output_format(parsed.response_format),
        thinking=fields.thinking(parsed.reasoning_effort, "reasoning_effort"),
        template_arguments=parsed.chat_template_kwargs or {},
    )
    include_usage = parsed.stream_options is not None and bool(parsed.stream_options.include_usage)
    return ChatCall(request, bool(parsed.stream), include_usage)


def _messages(bodies: Sequence[_MessageBody]) -> tuple[Message, ...]:
    """Return the turns. Raises :class:`ToolCallNotFoundError` for a tool's message that answers no call before it."""
    calls = OpenCalls()
    messages = []
    for index, body in enumerate(bodies):
        message = _message(body, index)
        for call in message.tool_calls:
            calls.add(call.id)
        if message.role is Role.TOOL and not calls.answer(message.tool_call_id or ""):
            raise _unanswerable(index, message.tool_call_id or "", calls)
        messages.append(message)
    return tuple(messages)


def _unanswerable(index: int, call_id: str, calls: OpenCalls) -> ToolCallNotFoundError:
    where = f"messages[{index}]"
    if calls.knows(call_id):
        return ToolCallNotFoundError(
            f"Invalid '{where}': a second message of role 'tool' with 'tool_call_id' '{call_id}'.", param=where
        )
    return ToolCallNotFoundError(
        f"Invalid '{where}': messages with role 'tool' must be a response to a preceding message with 'tool_calls', "
        f"and none has '{call_id}'.",
        param=where,
    )


def _message(body: _MessageBody, index: int) -> Message:
    where = f"messages[{index}]"
    parts: list[Part] = []
    for number, part in enumerate(body.content if isinstance(body.content, list) else ()):
        match part:
            case _TextBody(text):
                parts.append(TextPart(text))
            case _RefusalBody(refusal):
                parts.append(TextPart(refusal))
            case _ImageBody(address):
                param = f"{where}.content[{number}].image_url"
                if body.role != "user":
                    raise InvalidRequestError(f"Invalid '{param}': only user messages carry images.", param=param)
                parts.append(fields.image(address.url, address.detail, param))
    content = body.content if isinstance(body.content, str) else fields.collapse(parts)
    if body.role == "tool" and body.tool_call_id is None:
        raise InvalidRequestError(
            f"Invalid '{where}': a tool message needs 'tool_call_id'.", param=f"{where}.tool_call_id"
        )
    return Message(
        role=Role.SYSTEM if body.role == "developer" else Role(body.role),
        content=content or body.refusal or "",
        tool_calls=tuple(
            ToolCall(call.id, call.function.name, _arguments(call.function.arguments)) for call in body.tool_calls or ()
        ),
        tool_call_id=body.tool_call_id,
        name=body.name,
        reasoning=body.reasoning_content,
    )


def _arguments(value: str | dict[str, Any]) -> str:
    """Some clients send the arguments as an object; the wire has them as text."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _tools(bodies: Sequence[_ToolBody]) -> Iterator[Tool]:
    for index, body in enumerate(bodies):
        if body.type != "function":
            continue
        if body.function is None:
            name = f"tools[{index}].function"
            raise MissingParameterError(f"Missing required parameter: '{name}'.", param=name)
        yield body.function.tool()


def _tool_choice(body: ChatBody, tools: Sequence[Tool]) -> ToolChoice:
    parallel = body.parallel_tool_calls is not False
    match body.tool_choice:
        case None | "auto":
            return ToolChoice(ToolMode.AUTO, parallel=parallel)
        case "none":
            return ToolChoice(ToolMode.NONE, parallel=parallel)
        case "required":
            choice = ToolChoice(ToolMode.REQUIRED, parallel=parallel)
        case _NamedTool(function):
            choice = ToolChoice(ToolMode.NAMED, function.name, parallel)
            if all(tool.name != function.name for tool in tools):
                raise InvalidRequestError(
                    f"Invalid 'tool_choice': there is no tool named '{function.name}'.", param="tool_choice"
                )
    if not tools:
        raise InvalidRequestError("Invalid 'tool_choice': it needs 'tools'.", param="tool_choice")
    return choice


def _output_format(body: _ResponseFormat | None) -> OutputFormat:
    if body is None:
        return OutputFormat()
    schema = body.json_schema or _JsonSchema()
    return fields.output_format(body.type, schema.schema, schema.name, "response_format")

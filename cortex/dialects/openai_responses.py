"""OpenAI Responses: a body of ``/v1/responses`` to an ``InferenceRequest``.

Instructions and input flatten into one chat. Text-only content collapses to a string, mixed content keeps its parts,
reasoning items drop, function calls and their outputs become tool calls and tool messages. Its answers are made by
:mod:`cortex._fast.responses_stream`, into which :attr:`ResponsesCall.echo` is spliced.

Accepted without effect: ``store`` (a neuron keeps nothing), ``user``, ``metadata`` (echoed), ``service_tier``,
``prompt_cache_key``, ``safety_identifier``, ``max_tool_calls``, ``client_metadata``; tools other than functions (agents
send them to every server) are echoed and not offered to the model.
"""

from typing import Any, Literal

import msgspec

from cortex.dialects import openai_fields as fields
from cortex.wire.errors import ChainedConversationError, InvalidRequestError
from cortex.wire.request import (
    InferenceRequest,
    Message,
    OutputFormat,
    Part,
    Role,
    Sampling,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
)


class ResponsesCall(msgspec.Struct, frozen=True):
    """A decoded call. ``echo`` is a JSON object of the request fields that every response object repeats."""

    request: InferenceRequest
    stream: bool
    echo: bytes


class _Content(msgspec.Struct):
    """A part of a message or of a tool's output: text of any kind, a refusal, or an image."""

    type: Literal["input_text", "output_text", "text", "summary_text", "refusal", "input_image"]
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: str | None = None


class _Item(msgspec.Struct):
    """An input item of any type; what each type needs is checked in :func:`_messages`."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[_Content] | msgspec.UnsetType | None = msgspec.UNSET
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | list[_Content] | None = None


class _Tool(msgspec.Struct):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    tools: list["_Tool"] | None = None


class _NamedTool(msgspec.Struct):
    type: str
    name: str | None = None


class _Format(msgspec.Struct):
    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class _Text(msgspec.Struct):
    format: _Format | None = None
    verbosity: str | None = None


class _Reasoning(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None


class _Body(msgspec.Struct):
    model: str
    input: str | list[msgspec.Raw]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    tools: list[_Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | _NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: _Text | None = None
    reasoning: _Reasoning | None = None
    include: list[str] | None = None
    previous_response_id: str | None = None
    # known and refused
    conversation: object = None
    prompt: object = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None


_DECODER = msgspec.json.Decoder(_Body)
_ITEM_DECODER = msgspec.json.Decoder(_Item)
_TYPE_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ECHO_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])

_ECHOED = (
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "reasoning",
    "safety_identifier",
    "service_tier",
    "store",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "truncation",
    "user",
)


def decode(body: bytes) -> ResponsesCall:
    """Decode a request body.

    Raises:
        ChainedConversationError: it continues an earlier response, which only a gateway can look up.
        InvalidRequestError: with the parameter at fault; see :func:`cortex.dialects.openai_fields.decode`.
    """
    parsed = fields.decode(body, _DECODER)
    if parsed.previous_response_id is not None:
        raise ChainedConversationError(
            "A neuron does not store responses: 'previous_response_id' is resolved by the gateway.",
            param="previous_response_id",
        )
    fields.refuse(
        (
            ("conversation", parsed.conversation is not None),
            ("prompt", parsed.prompt is not None),
            ("background", bool(parsed.background)),
            ("truncation", parsed.truncation == "auto"),
        )
    )
    tools = tuple(_tools(parsed.tools or ()))
    wants_logprobs = "message.output_text.logprobs" in (parsed.include or ())
    messages = _messages(parsed)
    if not messages:
        raise InvalidRequestError("Invalid 'input': at least one message is needed.", param="input")
    reasoning = parsed.reasoning or _Reasoning()
    request = InferenceRequest(
        model=parsed.model,
        messages=messages,
        tools=tools,
        tool_choice=_tool_choice(parsed, tools),
        sampling=Sampling(
            temperature=fields.in_range("temperature", parsed.temperature, 0, 2),
            top_p=fields.in_range("top_p", parsed.top_p, 0, 1),
        ),
        max_tokens=fields.in_range("max_output_tokens", parsed.max_output_tokens, 1, 1 << 31),
        top_logprobs=fields.in_range("top_logprobs", parsed.top_logprobs or 0, 0, 20) if wants_logprobs else None,
        output_format=_output_format(parsed.text),
        thinking=fields.thinking(reasoning.effort, "reasoning.effort"),
    )
    return ResponsesCall(request, bool(parsed.stream), _echo(body))


def _messages(body: _Body) -> tuple[Message, ...]:
    messages: list[Message] = []
    if body.instructions:
        messages.append(Message(Role.SYSTEM, body.instructions))
    if isinstance(body.input, str):
        messages.append(Message(Role.USER, body.input))
        return tuple(messages)
    for index, raw in enumerate(body.input):
        where = f"input[{index}]"
        try:
            kind = msgspec.json.decode(_TYPE_DECODER.decode(raw).get("type", b'"message"'))
        except msgspec.DecodeError:
            raise InvalidRequestError(f"Invalid '{where}': an item is an object.", param=where) from None
        if kind in {"message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"}:
            try:
                item = _ITEM_DECODER.decode(raw)
            except msgspec.ValidationError as error:
                raise InvalidRequestError(f"Invalid '{where}': {error}.", param=where) from None
            _append(messages, item, where)
        elif kind == "item_reference":
            fields.refuse([(f"{where}.type=item_reference", True)])
        # Everything else (reasoning, and the traces of hosted tools) says nothing to the model and drops.
    return tuple(messages)


def _append(messages: list[Message], item: _Item, where: str) -> None:
    match item.type:
        case "message":
            if item.role is None or item.content is msgspec.UNSET:
                missing = "role" if item.role is None else "content"
                raise InvalidRequestError(f"Invalid '{where}': '{missing}' is missing.", param=f"{where}.{missing}")
            role = Role.SYSTEM if item.role == "developer" else Role(item.role)
            content = item.content if not isinstance(item.content, msgspec.UnsetType) else None
            messages.append(Message(role, _content(content, f"{where}.content")))
        case "function_call" | "custom_tool_call":
            if item.call_id is None or item.name is None:
                missing = "call_id" if item.call_id is None else "name"
                raise InvalidRequestError(f"Invalid '{where}': '{missing}' is missing.", param=f"{where}.{missing}")
            arguments = item.arguments
            if arguments is None:
                arguments = msgspec.json.encode({"input": item.input or ""}).decode()
            call = ToolCall(item.call_id, item.name, arguments)
            last = messages[-1] if messages else None
            if last is not None and last.role is Role.ASSISTANT:
                # Calls of one turn are separate items here and one message in a chat.
                messages[-1] = msgspec.structs.replace(last, tool_calls=(*last.tool_calls, call))
            else:
                messages.append(Message(Role.ASSISTANT, "", (call,)))
        case _:
            if item.call_id is None or item.output is None:
                missing = "call_id" if item.call_id is None else "output"
                raise InvalidRequestError(f"Invalid '{where}': '{missing}' is missing.", param=f"{where}.{missing}")
            messages.append(Message(Role.TOOL, _content(item.output, f"{where}.output"), tool_call_id=item.call_id))


def _content(content: str | list[_Content] | None, where: str) -> str | tuple[Part, ...]:
    if content is None or isinstance(content, str):
        return content or ""
    parts: list[Part] = []
    for number, part in enumerate(content):
        if part.type == "input_image":
            param = f"{where}[{number}].image_url"
            if part.image_url is None:
                raise InvalidRequestError(f"Invalid '{param}': an image needs an address.", param=param)
            parts.append(fields.image(part.image_url, part.detail, param))
        else:
            parts.append(TextPart(part.text or part.refusal or ""))
    return fields.collapse(parts)


def _tools(bodies: "list[_Tool] | tuple[()]") -> list[Tool]:
    tools: list[Tool] = []
    for body in bodies:
        if body.type == "function":
            if body.name is None:
                raise InvalidRequestError("Invalid 'tools': a function needs a name.", param="tools")
            tools.append(Tool(body.name, body.description or "", body.parameters or {}, bool(body.strict)))
        elif body.type == "namespace":
            tools += _tools(body.tools or ())
    return tools


def _tool_choice(body: _Body, tools: tuple[Tool, ...]) -> ToolChoice:
    parallel = body.parallel_tool_calls is not False
    match body.tool_choice:
        case None | "auto":
            return ToolChoice(ToolMode.AUTO, parallel=parallel)
        case "none":
            return ToolChoice(ToolMode.NONE, parallel=parallel)
        case "required":
            if not tools:
                raise InvalidRequestError("Invalid 'tool_choice': it needs 'tools'.", param="tool_choice")
            return ToolChoice(ToolMode.REQUIRED, parallel=parallel)
        case _NamedTool(kind, name):
            fields.refuse([(f"tool_choice.type={kind}", kind != "function")])
            if name not in {tool.name for tool in tools}:
                raise InvalidRequestError(
                    f"Invalid 'tool_choice': there is no tool named '{name}'.", param="tool_choice"
                )
            return ToolChoice(ToolMode.NAMED, name, parallel)


def _output_format(text: _Text | None) -> OutputFormat:
    if text is None or text.format is None:
        return OutputFormat()
    return fields.output_format(text.format.type, text.format.schema, text.format.name, "text.format")


def _echo(body: bytes) -> bytes:
    """Return the fields a response object repeats, as sent; absent and null ones are left to the projector."""
    given = _ECHO_DECODER.decode(body)
    return msgspec.json.encode({n: given[n] for n in _ECHOED if n in given and bytes(given[n]) != b"null"})

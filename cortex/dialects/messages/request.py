"""Anthropic Messages: a body of ``/v1/messages`` or ``/v1/messages/count_tokens`` to an ``InferenceRequest``.

Messages are read by :mod:`cortex.dialects.messages.blocks`, responses written by :mod:`cortex._fast.messages_stream`.

:data:`PARAMETERS` lists the parameters without effect. Hosted tools are not offered to the model, and are named in the
answer's header; those that clients run have the schemas that Anthropic has published. An assistant's message
at the end is answered by another rather than continued.
"""

import secrets
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from cortex._fast.messages_stream import MessagesStream
from cortex.dialects import fields
from cortex.dialects.call import Answering, GenerationCall
from cortex.dialects.generation import GenerationBody
from cortex.dialects.messages import blocks
from cortex.dialects.messages.client_tools import client_tool
from cortex.dialects.omitted_parts import readable
from cortex.dialects.parameters import OPEN_SERVERS, OPEN_SERVERS_WITHOUT_EFFECT, Parameters
from cortex.wire.errors import InvalidRequestError, ThreadUnsupportedError
from cortex.wire.request import (
    InferenceRequest,
    OutputFormat,
    Tool,
    ToolChoice,
    ToolMode,
)

MAX_STOP_SEQUENCES = 64


class MessagesCall(GenerationCall, frozen=True):
    """A decoded call."""

    def encoder(self, answering: Answering) -> MessagesStream:
        """Return the encoder of the answer, which always has its usage."""
        return MessagesStream(f"msg_{secrets.token_hex(12)}", answering.name or self.request.model)


class _Tool(msgspec.Struct):
    name: str | None = None
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    display_width_px: int | None = None
    display_height_px: int | None = None
    strict: bool | None = None


class _ToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Thinking(msgspec.Struct):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None


class _Format(msgspec.Struct):
    type: str
    schema: dict[str, Any] | None = None
    name: str | None = None


class _OutputConfig(msgspec.Struct):
    effort: str | None = None
    format: _Format | None = None


class MessagesBody(GenerationBody, kw_only=True):
    """A request body, as far as it is read."""

    model: str
    messages: list[blocks.InputMessage]
    system: str | list[blocks.Block] | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    tools: list[_Tool] | None = None
    tool_choice: _ToolChoice | None = None
    thinking: _Thinking | None = None
    output_config: _OutputConfig | None = None
    output_format: _Format | None = None
    # known and refused
    thread: object = None


PARAMETERS = Parameters(
    MessagesBody,
    without_effect={
        "": "anthropic_beta betas cache_control context_management inference_geo metadata service_tier speed "
        + OPEN_SERVERS_WITHOUT_EFFECT,
        "messages.content": "cache_control caller citations context data file_id is_error partial_json signature "
        "server_name stop_reason url",
        "messages.content.source": "file_id",
        "thinking": "display",
        "output_config": "task_budget",
        "tools": "cache_control " + fields.HOSTED_TOOL_NAMES,
    },
    refused=OPEN_SERVERS,
    max_items={"messages": 20_000, "messages.content": 10_000, "tools": 1_000, "system": 1_000},
)


def decode(body: bytes) -> MessagesCall:
    """Decode a request body.

    Raises:
        InvalidRequestError: with the parameter at fault; see :meth:`cortex.dialects.parameters.Parameters.decode`.
        ThreadUnsupportedError: it continues a conversation that it does not contain.
    """
    parsed, ignored = PARAMETERS.decode(body)
    if parsed.thread not in (None, False):
        raise ThreadUnsupportedError(
            "Conversations are not held here: send all messages, without 'thread'.", param="thread"
        )
    if not parsed.messages:
        raise InvalidRequestError("Invalid 'messages': at least one message is needed.", param="messages")
    messages = list(blocks.system(parsed.system, "system"))
    for index, sent in enumerate(parsed.messages):
        messages += blocks.messages_of(sent, f"messages[{index}].content")
    blocks.check_results(parsed.messages)
    tools, hosted = _tools(parsed.tools or ())
    read, num_omitted = readable(messages, images=True, model=parsed.model)
    thinks, config = _thinking(parsed.thinking), parsed.output_config or _OutputConfig()
    effort = fields.effort_of(config.effort, "output_config.effort")
    asked = parsed.thinking if parsed.thinking is not None and thinks else _Thinking("disabled")
    budget = fields.thinking_budget(("thinking.budget_tokens", asked.budget_tokens))
    request = InferenceRequest(
        model=parsed.model,
        messages=read,
        tools=tools,
        tool_choice=_tool_choice(parsed.tool_choice, tools),
        sampling=parsed.sampling(),
        ending=parsed.ending(),
        max_tokens=fields.in_range("max_tokens", parsed.max_tokens, 1, 1 << 31),
        stop=fields.stop_strings(parsed.stop_sequences, MAX_STOP_SEQUENCES, param="stop_sequences"),
        output_format=parsed.form(_output_format(parsed), "output_config.format"),
        thinking=thinks,
        effort=effort if thinks is not False else "",
        thinking_budget=budget,
    )
    return MessagesCall(request, bool(parsed.stream), ignored=(*ignored, *hosted), num_omitted=num_omitted)


def _tools(bodies: Sequence[_Tool]) -> tuple[tuple[Tool, ...], tuple[str, ...]]:
    """Return the tools that the client runs, and the places of hosted tools."""
    tools: list[Tool] = []
    hosted: list[str] = []
    for index, body in enumerate(bodies):
        if body.type in (None, "custom") or body.input_schema is not None:
            name = fields.needed(body.name, f"tools[{index}].name")
            tools.append(Tool(name, body.description or "", body.input_schema or {}, body.strict))
        elif (known := client_tool(body.type, body.name, msgspec.structs.asdict(body))) is not None:
            tools.append(known)
        else:
            hosted.append(f"tools[{index}].type={body.type}")
    return tuple(tools), tuple(hosted)


def _tool_choice(choice: _ToolChoice | None, tools: Sequence[Tool]) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    parallel = not choice.disable_parallel_tool_use
    match choice.type:
        case "auto":
            return ToolChoice(ToolMode.AUTO, parallel=parallel)
        case "none":
            return ToolChoice(ToolMode.NONE, parallel=parallel)
        case "any" if tools:
            return ToolChoice(ToolMode.REQUIRED, parallel=parallel)
        case "any":
            raise InvalidRequestError("Invalid 'tool_choice': it needs 'tools'.", param="tool_choice")
        case "tool":
            name = fields.needed(choice.name, "tool_choice.name")
            if name not in {tool.name for tool in tools}:
                raise InvalidRequestError(
                    f"Invalid 'tool_choice': there is no tool named '{name}'.", param="tool_choice"
                )
            return ToolChoice(ToolMode.NAMED, name, parallel)


def _thinking(asked: _Thinking | None) -> bool | None:
    """Return whether to think; not by default, as such clients read the first block as the answer."""
    if asked is None or asked.type == "disabled":
        return False
    return True if asked.type == "enabled" else None


def _output_format(body: MessagesBody) -> OutputFormat:
    name, asked = "output_config.format", body.output_config.format if body.output_config is not None else None
    if asked is None:
        name, asked = "output_format", body.output_format
    return (
        OutputFormat()
        if asked is None
        else fields.output_format(asked.type, asked.schema, asked.name, name, strict=True)
    )

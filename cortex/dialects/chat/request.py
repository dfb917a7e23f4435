"""OpenAI Chat Completions: a body of ``/v1/chat/completions`` to an ``InferenceRequest``.

Answers are written by :mod:`cortex._fast.chat_stream`.
:data:`PARAMETERS` lists the parameters without effect. Tools are read by :mod:`cortex.dialects.chat.tools`.
"""

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from cortex._fast.chat_stream import ChatStream
from cortex.dialects import fields
from cortex.dialects.answered_calls import OpenCalls
from cortex.dialects.call import Answering, GenerationCall
from cortex.dialects.chat.tools import ChoiceBody, ToolBody, chosen, offered
from cortex.dialects.generation import GenerationBody, ResponseFormat, output_format_of
from cortex.dialects.omitted_parts import readable
from cortex.dialects.parameters import OPEN_SERVERS, OPEN_SERVERS_WITHOUT_EFFECT, Parameters
from cortex.wire.errors import InvalidRequestError, ToolCallNotFoundError
from cortex.wire.request import (
    InferenceRequest,
    MediaPart,
    Message,
    Part,
    Role,
    TextPart,
    ToolCall,
)


class ChatCall(GenerationCall, frozen=True):
    """A decoded call: the request to the model, and the form of the response."""

    include_usage: bool
    custom: frozenset[str] = frozenset()
    """Names of custom tools, whose calls carry an input."""

    def encoder(self, answering: Answering) -> ChatStream:
        """Return the encoder of the answer."""
        return ChatStream(
            f"chatcmpl-{secrets.token_hex(12)}",
            answering.name or self.request.model,
            int(time.time()),
            self.request.num_choices,
            include_usage=self.include_usage,
            report_usage=answering.report_usage,
            custom_tools=self.custom,
            keeps=not self.stream,
        )


class _ImageAddress(msgspec.Struct):
    url: str
    detail: str | None = None


class _PartBody(msgspec.Struct):
    type: Literal["text", "refusal", "image_url", "input_audio", "audio_url", "video_url", "file"]
    text: str | None = None
    refusal: str | None = None
    image_url: _ImageAddress | None = None
    input_audio: object = None
    audio_url: object = None
    video_url: object = None
    file: object = None


_MEDIA = {"input_audio": "audio", "audio_url": "audio", "video_url": "video", "file": "file"}


class _CalledFunction(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] | None = "{}"


class _CalledCustom(msgspec.Struct):
    name: str
    input: str = ""


class _ToolCallBody(msgspec.Struct):
    id: str
    function: _CalledFunction | None = None
    custom: _CalledCustom | None = None
    type: Literal["function", "custom"] = "function"


class _MessageBody(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_PartBody] | None = None
    name: str | None = None
    tool_calls: list[_ToolCallBody] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: object = None
    refusal: str | None = None


class _Reasoning(msgspec.Struct):
    effort: str | None = None
    max_tokens: int | None = None


class ChatBody(GenerationBody, kw_only=True):
    """A request body, as far as it is read."""

    model: str
    messages: list[_MessageBody]
    stream: bool | None = None
    stream_options: fields.StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n_predict: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Literal["auto", "none", "required"] | ChoiceBody | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    reasoning: _Reasoning | None = None
    thinking_budget: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


PARAMETERS = Parameters(
    ChatBody,
    without_effect={
        "": "metadata prompt_cache_key prompt_cache_retention safety_identifier service_tier store user verbosity "
        + OPEN_SERVERS_WITHOUT_EFFECT,
        "stream_options": "include_obfuscation",
        "messages": "annotations audio cache_control created_at function_call id phase provider_specific_fields "
        "reasoning_details thinking_blocks",
        "messages.content": "annotations cache_control id",
        "messages.tool_calls": "extra_content index provider_specific_fields",
        "tools": "cache_control " + fields.HOSTED_TOOL_NAMES,
        "tools.function": "cache_control",
        "response_format.json_schema": "description",
    },
    refused={
        **OPEN_SERVERS,
        "add_special_tokens": (False,),
        "modalities": (["text"],),
        **dict.fromkeys(("audio", "prediction", "web_search_options", "functions", "function_call"), ()),
    },
    max_items={"messages": 20_000, "messages.content": 10_000, "messages.tool_calls": 1_000, "tools": 1_000},
)


def decode(body: bytes) -> ChatCall:
    """Decode a request body.

    Raises:
        InvalidRequestError: with the parameter at fault; see :meth:`cortex.dialects.parameters.Parameters.decode`.
    """
    parsed, ignored = PARAMETERS.decode(body)
    if not parsed.messages:
        raise InvalidRequestError("Invalid 'messages': at least one message is needed.", param="messages")
    limit_name, limit = fields.first_given(
        ("max_completion_tokens", parsed.max_completion_tokens),
        ("max_tokens", parsed.max_tokens),
        ("n_predict", parsed.n_predict),
    )
    wants_logprobs = bool(parsed.logprobs)
    if parsed.top_logprobs is not None and not wants_logprobs:
        raise InvalidRequestError("Invalid 'top_logprobs': it needs 'logprobs' to be true.", param="top_logprobs")
    tools = offered(parsed.tools or ())
    tool_choice, left = chosen(parsed.tool_choice, parsed.parallel_tool_calls is not False, tools)
    messages, num_omitted = readable(_messages(parsed.messages), images=True, model=parsed.model)
    effort = _effort(parsed)
    request = InferenceRequest(
        model=parsed.model,
        messages=messages,
        tools=left,
        tool_choice=tool_choice,
        sampling=parsed.sampling(),
        max_tokens=fields.in_range(limit_name, limit, 1, 1 << 31),
        stop=fields.stop_strings(parsed.stop),
        ending=parsed.ending(),
        num_choices=fields.in_range("n", parsed.n, 1, 128) or 1,
        top_logprobs=fields.in_range("top_logprobs", parsed.top_logprobs or 0, 0, 20) if wants_logprobs else None,
        output_format=parsed.form(output_format_of(parsed.response_format), "response_format"),
        thinking=fields.thinking(*effort),
        effort=fields.effort_of(*effort),
        thinking_budget=fields.thinking_budget(
            ("thinking_budget", parsed.thinking_budget),
            ("reasoning.max_tokens", None if parsed.reasoning is None else parsed.reasoning.max_tokens),
        ),
        template_arguments=parsed.chat_template_kwargs or {},
    )
    include_usage = parsed.stream_options is not None and bool(parsed.stream_options.include_usage)
    reported = (*ignored, *tools.hosted)
    return ChatCall(
        request, bool(parsed.stream), include_usage, tools.custom, ignored=reported, num_omitted=num_omitted
    )


def _messages(bodies: Sequence[_MessageBody]) -> tuple[Message, ...]:
    """Return the messages. Raises :class:`ToolCallNotFoundError` for a tool's message without a call before it."""
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
    if calls.has_call(call_id):
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
        place = f"{where}.content[{number}]"
        if part.type in _MEDIA:
            parts.append(MediaPart(_MEDIA[part.type], place))
        elif part.type == "image_url":
            address = fields.needed(part.image_url, f"{place}.image_url")
            parts.append(fields.image(address.url, address.detail, f"{place}.image_url"))
        else:
            text = part.text if part.type == "text" else part.refusal
            parts.append(TextPart(fields.needed(text, f"{place}.{part.type}")))
    content = body.content if isinstance(body.content, str) else fields.collapse(parts)
    if body.role == "tool" and body.tool_call_id is None:
        raise InvalidRequestError(
            f"Invalid '{where}': a tool message needs 'tool_call_id'.", param=f"{where}.tool_call_id"
        )
    return Message(
        role=Role.SYSTEM if body.role == "developer" else Role(body.role),
        content=content or body.refusal or "",
        tool_calls=tuple(
            _call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(body.tool_calls or ())
        ),
        tool_call_id=body.tool_call_id,
        name=body.name,
        # vLLM and others call it by the shorter name now; OpenRouter's may be an object.
        reasoning=body.reasoning_content or (body.reasoning if isinstance(body.reasoning, str) else None),
    )


def _call(body: _ToolCallBody, where: str) -> ToolCall:
    if body.custom is not None:
        return ToolCall(body.id, body.custom.name, msgspec.json.encode({"input": body.custom.input}).decode())
    function = fields.needed(body.function, f"{where}.function")
    return ToolCall(body.id, function.name, _arguments(function.arguments))


def _arguments(value: str | dict[str, Any] | None) -> str:
    """Return arguments as text; some clients send an object or null."""
    if value is None:
        return "{}"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _effort(body: ChatBody) -> tuple[str | None, str]:
    """Return the effort and its parameter; OpenRouter and Ollama have it in an object, as Responses do."""
    if body.reasoning_effort is None and body.reasoning is not None:
        return body.reasoning.effort, "reasoning.effort"
    return body.reasoning_effort, "reasoning_effort"

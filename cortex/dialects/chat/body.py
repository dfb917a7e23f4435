"""A request as a body of ``/v1/chat/completions``, for nodes that speak chat alone."""

from typing import Any

import msgspec

from cortex.dialects.generation import SAMPLING
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


def chat_body(request: InferenceRequest, *, stream: bool) -> bytes:
    """Return ``request`` as a body of ``/v1/chat/completions``. System messages are one, at the front."""
    system = "\n\n".join(_plain(message) for message in request.messages if message.role is Role.SYSTEM)
    messages = [_message(message) for message in request.messages if message.role is not Role.SYSTEM]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    sampling = request.sampling
    optional = {
        "max_tokens": request.max_tokens,
        **{name: getattr(sampling, name) for name in (*SAMPLING, "repetition_penalty")},
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

"""OpenAI Responses: a body of ``/v1/responses`` to an ``InferenceRequest``.

Instructions and input flatten into one chat. Items are read by :mod:`cortex.dialects.responses.items`, tools by
:mod:`cortex.dialects.responses.tools`; answers are made by :mod:`cortex._fast.responses_stream`, into which
:attr:`ResponsesCall.echo` is spliced.

:data:`PARAMETERS` lists the parameters without effect: among them ``store`` (a neuron keeps nothing), ``metadata``
(echoed), ``max_tool_calls``, which counts calls of hosted tools, and ``truncation: auto``: a conversation that is too
long is refused, and a response has ``disabled``.
"""

import secrets
import time
from typing import Any, Literal

import msgspec

from cortex._fast.responses_stream import ResponsesStream
from cortex.dialects import fields
from cortex.dialects.call import Answering, GenerationCall
from cortex.dialects.generation import GenerationBody
from cortex.dialects.omitted_parts import readable
from cortex.dialects.parameters import OPEN_SERVERS, OPEN_SERVERS_WITHOUT_EFFECT, Parameters
from cortex.dialects.responses import tools as response_tools
from cortex.dialects.responses.context import ResponseContext
from cortex.dialects.responses.items import Item, messages_of
from cortex.dialects.responses.tools import OfferedTools
from cortex.wire.errors import ChainedConversationError, InvalidRequestError
from cortex.wire.request import (
    InferenceRequest,
    Message,
    OutputFormat,
    Role,
)


class ResponsesCall(GenerationCall, frozen=True):
    """A decoded call. ``echo`` is a JSON object of the request fields that every response object repeats."""

    echo: bytes
    tools: OfferedTools
    summarises: bool
    """Whether reasoning is returned as a summary."""
    seals: bool
    """Whether reasoning is returned as ``encrypted_content``."""

    def encoder(self, answering: Answering) -> ResponsesStream:
        """Return the encoder of the answer."""
        return ResponsesStream(
            answering.context.id or f"resp_{secrets.token_hex(24)}",
            answering.name or self.request.model,
            int(time.time()),
            self.echoed(answering.context),
            report_usage=answering.report_usage,
            custom_tools=self.tools.custom,
            namespaces=self.tools.namespaces,
            summarises=self.summarises,
            seals=self.seals,
        )

    def echoed(self, context: ResponseContext) -> bytes:
        """Return :attr:`echo` with the members that the gateway decides."""
        members = {
            "store": context.store,
            "previous_response_id": context.previous_response_id,
            "background": context.background,
            "conversation": {"id": context.conversation} if context.conversation else None,
        }
        members = {name: value for name, value in members.items() if value}
        return msgspec.json.encode(_FIELDS_DECODER.decode(self.echo) | members) if members else self.echo


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
    generate_summary: str | None = None


class ResponsesBody(GenerationBody, kw_only=True):
    """A request body, as far as it is read. Sampling has the parameters of open servers, too."""

    model: str
    input: str | list[msgspec.Raw]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    stop: str | list[str] | None = None
    top_logprobs: int | None = None
    tools: list[response_tools.ToolBody] | None = None
    tool_choice: Literal["auto", "none", "required"] | response_tools.ChoiceBody | None = None
    parallel_tool_calls: bool | None = None
    text: _Text | None = None
    reasoning: _Reasoning | None = None
    include: list[str] | None = None
    previous_response_id: str | None = None
    truncation: Literal["auto", "disabled"] | None = None


PARAMETERS = Parameters(
    ResponsesBody,
    items={"input": Item},
    without_effect={
        "": "client_metadata context_management max_tool_calls metadata prompt_cache_key prompt_cache_options "
        "prompt_cache_retention safety_identifier service_tier store stream_options user "
        + OPEN_SERVERS_WITHOUT_EFFECT,
        "input": "acknowledged_safety_checks action approval_request_id approve caller code container_id created_by "
        "data environment error execution id max_output_length metadata operation outputs phase queries "
        "reason result results server_label status tools",
        "input.content": "annotations file_data file_id file_url filename id input_audio logprobs "
        "prompt_cache_breakpoint",
        "text.format": "description",
        "tool_choice": "server_label",
        "tools": fields.HOSTED_TOOL_NAMES,
        "reasoning": "context mode",
    },
    refused={**OPEN_SERVERS, "conversation": (), "prompt": (), "background": (False,)},
    max_items={"input": 20_000, "input.content": 10_000, "tools": 1_000},
)
_FIELDS_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])

_ECHOED = (
    "frequency_penalty",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "parallel_tool_calls",
    "presence_penalty",
    "prompt_cache_key",
    "reasoning",
    "safety_identifier",
    "service_tier",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
)


def decode(body: bytes) -> ResponsesCall:
    """Decode a request body.

    Raises:
        ChainedConversationError: it continues a response; only a gateway resolves these.
        InvalidRequestError: with the parameter at fault; see :meth:`cortex.dialects.parameters.Parameters.decode`.
    """
    parsed, ignored = PARAMETERS.decode(body)
    if parsed.previous_response_id is not None:
        raise ChainedConversationError(
            "A neuron does not store responses: 'previous_response_id' is resolved by the gateway.",
            param="previous_response_id",
        )
    tools = response_tools.offered(parsed.tools or ())
    tool_choice, left = response_tools.chosen(parsed.tool_choice, parsed.parallel_tool_calls is not False, tools)
    included = parsed.include or ()
    wants_logprobs = "message.output_text.logprobs" in included
    messages = [Message(Role.SYSTEM, parsed.instructions)] if parsed.instructions else []
    if isinstance(parsed.input, str):
        messages.append(Message(Role.USER, parsed.input))
    else:
        messages += messages_of(parsed.input, tools)
    if not messages:
        raise InvalidRequestError("Invalid 'input': at least one message is needed.", param="input")
    read, num_omitted = readable(messages, images=True, model=parsed.model, param="input")
    reasoning = parsed.reasoning or _Reasoning()
    request = InferenceRequest(
        model=parsed.model,
        messages=read,
        tools=left,
        tool_choice=tool_choice,
        sampling=parsed.sampling(),
        max_tokens=fields.in_range("max_output_tokens", parsed.max_output_tokens, 1, 1 << 31),
        stop=fields.stop_strings(parsed.stop),
        top_logprobs=fields.in_range("top_logprobs", parsed.top_logprobs or 0, 0, 20) if wants_logprobs else None,
        ending=parsed.ending(),
        output_format=parsed.form(_output_format(parsed.text), "text.format"),
        thinking=fields.thinking(reasoning.effort, "reasoning.effort"),
        effort=fields.effort_of(reasoning.effort, "reasoning.effort"),
    )
    return ResponsesCall(
        request,
        bool(parsed.stream),
        _echo(body),
        tools,
        summarises=reasoning.summary is not None or reasoning.generate_summary is not None,
        seals="reasoning.encrypted_content" in included,
        ignored=(*ignored, *tools.hosted),
        num_omitted=num_omitted,
    )


def _output_format(text: _Text | None) -> OutputFormat:
    if text is None or text.format is None:
        return OutputFormat()
    asked = text.format
    return fields.output_format(asked.type, asked.schema, asked.name, "text.format", strict=asked.strict)


def _echo(body: bytes) -> bytes:
    """Return the fields a response object repeats, as sent; absent and null ones are left to the projector."""
    given = _FIELDS_DECODER.decode(body)
    echo = {n: given[n] for n in _ECHOED if n in given and bytes(given[n]) != b"null"}
    if "tools" in echo:
        echo["tools"] = msgspec.Raw(response_tools.echoed(bytes(echo["tools"])))
    if "text" in echo:
        text = _FIELDS_DECODER.decode(echo["text"])
        echo["text"] = msgspec.Raw(msgspec.json.encode({"format": msgspec.Raw(b'{"type":"text"}')} | text))
    return msgspec.json.encode(echo)

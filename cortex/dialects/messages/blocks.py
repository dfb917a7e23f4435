"""The messages of the Anthropic dialect: content blocks to ``Message`` values.

A user message becomes tool messages, one for each result, then a user message with the rest; replayed thinking becomes
the message's reasoning, whatever its signature; system messages keep their place. Blocks of hosted tools in an
assistant's message are dropped, as no model can read them; an unsupported block of a user's message is refused by name.
"""

import base64
import binascii
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec

from cortex.dialects import fields
from cortex.dialects.answered_calls import OpenCalls
from cortex.dialects.fields import needed
from cortex.wire.errors import (
    InvalidRequestError,
    InvalidTypeError,
    ToolCallNotFoundError,
)
from cortex.wire.request import MediaPart, Message, Part, Role, TextPart, ToolCall

BILLING_HEADER = "x-anthropic-billing-header:"
"""Start of Claude Code's system block about billing; it can change with every request, past any prefix cache."""


class Source(msgspec.Struct):
    """Source of an image or a document."""

    type: str
    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    content: "str | list[Block] | None" = None


class Block(msgspec.Struct):
    """A content block of any type; required members are checked by its reader."""

    type: str
    text: str | None = None
    thinking: str | None = None
    source: Source | str | None = None
    title: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    tool_name: str | None = None
    content: "str | list[Block] | dict[str, Any] | None" = None
    is_error: bool | None = None


class InputMessage(msgspec.Struct):
    """An entry of ``messages``."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


def system(content: str | Sequence[Block] | None, where: str) -> Iterator[Message]:
    """Yield a system message for each text, without the block about billing."""
    texts = [content] if isinstance(content, str) else _texts(content or (), where)
    for text in texts:
        if text.startswith(BILLING_HEADER):
            _, _, text = text.partition("\n")
        if text.strip():
            yield Message(Role.SYSTEM, text)


def _texts(blocks: Iterable[Block], where: str) -> list[str]:
    texts = []
    for number, block in enumerate(blocks):
        if block.type != "text":
            raise _unknown_type(block, f"{where}[{number}]")
        texts.append(needed(block.text, f"{where}[{number}].text"))
    return texts


def messages_of(sent: InputMessage, where: str) -> Iterator[Message]:
    """Yield the messages of an entry; ``where`` names its content in errors.

    Raises:
        InvalidRequestError: a block lacks a member that its type requires, or is not supported.
    """
    if sent.role == "system":
        yield from system(sent.content, where)
    elif isinstance(sent.content, str):
        yield Message(Role(sent.role), sent.content)
    elif sent.role == "assistant":
        yield _assistant(sent.content, where)
    else:
        yield from _user(sent.content, where)


def check_results(messages: Sequence[InputMessage]) -> None:
    """Check that each ``tool_result`` answers a ``tool_use`` of the assistant's message before it, as Anthropic does.

    Adjacent messages of one role count as one; system messages are ignored.

    Raises:
        ToolCallNotFoundError: a result answers no call of that message, or an answered one.
    """
    calls = OpenCalls()
    was_assistant = False
    for index, sent in enumerate(messages):
        if sent.role == "assistant" and not was_assistant:
            calls.forget()
        if sent.role != "system":
            was_assistant = sent.role == "assistant"
        if isinstance(sent.content, str):
            continue
        for number, block in enumerate(sent.content):
            if block.type == "tool_use" and sent.role == "assistant" and block.id is not None:
                calls.add(block.id)
            elif block.type == "tool_result" and block.tool_use_id is not None and not calls.answer(block.tool_use_id):
                raise _unanswerable(f"messages.{index}.content.{number}", block.tool_use_id, calls)


def _unanswerable(where: str, call_id: str, calls: OpenCalls) -> ToolCallNotFoundError:
    if calls.has_call(call_id):
        message = f"{where}: each tool_use must have a single result. Found a second `tool_result` with id: {call_id}."
    else:
        message = (
            f"{where}: unexpected `tool_use_id` found in `tool_result` blocks: {call_id}. Each `tool_result` block "
            "must have a corresponding `tool_use` block in the previous message."
        )
    return ToolCallNotFoundError(message, param="messages")


def _user(blocks: Sequence[Block], where: str) -> Iterator[Message]:
    """Yield the results of tools, then what the user says."""
    content: list[Part] = []
    num_results = 0
    for number, block in enumerate(blocks):
        place = f"{where}[{number}]"
        if block.type == "tool_result":
            num_results += 1
            call_id = needed(block.tool_use_id, f"{place}.tool_use_id")
            yield Message(Role.TOOL, _result(block, f"{place}.content"), tool_call_id=call_id)
        else:
            content += _parts(block, place)
    if content or not num_results:
        yield Message(Role.USER, fields.collapse(content))


def _assistant(blocks: Sequence[Block], where: str) -> Message:
    """Return an assistant's message, without the blocks of hosted tools."""
    content: list[Part] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for number, block in enumerate(blocks):
        place = f"{where}[{number}]"
        match block.type:
            case "text":
                content += _parts(block, place)
            case "thinking":
                thoughts.append(needed(block.thinking, f"{place}.thinking"))
            case "tool_use":
                arguments = msgspec.json.encode(block.input or {}).decode()
                name = needed(block.name, f"{place}.name")
                calls.append(ToolCall(needed(block.id, f"{place}.id"), name, arguments))
    return Message(Role.ASSISTANT, fields.collapse(content), tuple(calls), reasoning="".join(thoughts) or None)


def _result(block: Block, where: str) -> str | tuple[Part, ...]:
    """Return a tool's result. Templates have no failed results: the text of one is prefixed with ``Error``."""
    parts: list[Part] = []
    if isinstance(block.content, str):
        parts.append(TextPart(block.content))
    elif isinstance(block.content, dict):
        raise InvalidTypeError(f"Invalid value for '{where}': expected `str | array`.", param=where)
    else:
        for number, inner in enumerate(block.content or ()):
            parts += _parts(inner, f"{where}[{number}]")
    if block.is_error and not any(isinstance(part, TextPart) and "error" in part.text.lower() for part in parts):
        parts.insert(0, TextPart("Error: "))
    return fields.collapse(parts)


def _parts(block: Block, where: str) -> list[Part]:
    """Return the content parts of a block."""
    match block.type:
        case "text":
            return [TextPart(needed(block.text, f"{where}.text"))]
        case "image":
            return [_image(_source(block, f"{where}.source"), f"{where}.source")]
        case "document":
            return _document(block, where)
        case "search_result":
            inner = block.content if isinstance(block.content, list) else ()
            return [TextPart("\n".join(filter(None, [block.title, *_texts(inner, f"{where}.content")])))]
        case "container_upload":
            return [MediaPart("file", where)]
        case "tool_reference":
            return [TextPart(needed(block.tool_name, f"{where}.tool_name"))]
    raise _unknown_type(block, where)


def _source(block: Block, where: str) -> Source:
    if isinstance(block.source, str):  # that of a search result
        raise InvalidTypeError(f"Invalid value for '{where}': expected `object`, got `str`.", param=where)
    return needed(block.source, where)


def _image(source: Source, where: str) -> Part:
    match source.type:
        case "base64":
            media_type = needed(source.media_type, f"{where}.media_type")
            address = f"data:{media_type};base64,{needed(source.data, f'{where}.data')}"
        case "url":
            address = needed(source.url, f"{where}.url")
        case _:  # an upload
            return MediaPart("image", f"{where}.type={source.type}")
    return fields.image(address, None, where)


def _document(block: Block, where: str) -> list[Part]:
    """Return a document of text; others (PDF, addresses, uploads) become a ``MediaPart``."""
    source = _source(block, f"{where}.source")
    parts: list[Part] = [TextPart(f"{block.title}\n")] if block.title else []
    if source.type == "text":
        parts.append(TextPart(needed(source.data, f"{where}.source.data")))
    elif source.type == "content":
        content = source.content or ""
        if isinstance(content, str):
            parts.append(TextPart(content))
        else:
            for number, inner in enumerate(content):
                parts += _parts(inner, f"{where}.source.content[{number}]")
    elif source.type == "base64" and (source.media_type or "").startswith("text/"):
        try:
            text = base64.b64decode(needed(source.data, f"{where}.source.data"), validate=True).decode()
        except (binascii.Error, ValueError):
            place = f"{where}.source.data"
            raise InvalidRequestError(f"Invalid '{place}': it is not text in base64.", param=place) from None
        parts.append(TextPart(text))
    else:
        parts.append(MediaPart("document", f"{where}.source.type={source.media_type or source.type}"))
    return parts


def _unknown_type(block: Block, where: str) -> InvalidTypeError:
    return InvalidTypeError(f"Invalid value for '{where}.type': '{block.type}' has no meaning here.", param=where)

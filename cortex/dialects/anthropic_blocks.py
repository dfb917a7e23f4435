"""The turns of the Anthropic dialect: content blocks to messages.

A user turn becomes the tool messages of its results, then what the user says; thinking that is replayed becomes the
turn's reasoning, whatever its signature; system turns keep their place. Blocks that hosted tools left in an assistant's
turn drop, as the model cannot read them; a block of a user's turn that cannot be shown is refused by name.
"""

import base64
import binascii
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from cortex.dialects import openai_fields as fields
from cortex.dialects.answered_calls import OpenCalls
from cortex.wire.errors import (
    InvalidRequestError,
    InvalidTypeError,
    MissingParameterError,
    ToolCallNotFoundError,
)
from cortex.wire.request import MediaPart, Message, Part, Role, TextPart, ToolCall

T = TypeVar("T")

BILLING_HEADER = "x-anthropic-billing-header:"
"""Begins a system block in which Claude Code says who pays. It can change each turn, which no prefix cache survives."""


class Source(msgspec.Struct):
    """Where an image or a document is."""

    type: str
    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    content: "str | list[Block] | None" = None


class Block(msgspec.Struct):
    """A content block of any type; what each type needs is checked where it is read."""

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
    """Yield a system message of each text, but for the one about billing."""
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
    """Yield what a turn is to the model; ``where`` is the name of its content in errors.

    Raises:
        InvalidRequestError: a block lacks what its type needs, or cannot be shown to the model.
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
    """Hold each ``tool_result`` to a ``tool_use`` of the assistant's turn before it, as Anthropic does.

    Turns of one role behind one another are one turn; system turns are none.

    Raises:
        ToolCallNotFoundError: a result answers no call of that turn, or one that has its result.
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
    if calls.knows(call_id):
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
    """Return the turn as one message. Blocks of other types are traces of hosted tools: the model cannot read them."""
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
    """Return what a tool said. Templates know no failed results, so one that does not say so itself is made to."""
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
    """Return what a block shows the model."""
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
    if block.source is None:
        raise _missing(where)
    if isinstance(block.source, str):  # that of a search result
        raise InvalidTypeError(f"Invalid value for '{where}': expected `object`, got `str`.", param=where)
    return block.source


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
    """Return a document of text. Others (PDF, addresses, uploads) would have to be read first."""
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


def needed(value: T | None, where: str) -> T:
    """Return ``value``; raise :class:`MissingParameterError` if it is absent."""
    if value is None:
        raise _missing(where)
    return value


def _missing(where: str) -> MissingParameterError:
    return MissingParameterError(f"Missing required parameter: '{where}'.", param=where)


def _unknown_type(block: Block, where: str) -> InvalidTypeError:
    return InvalidTypeError(f"Invalid value for '{where}.type': '{block.type}' has no meaning here.", param=where)

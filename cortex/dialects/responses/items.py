"""The input items of a Responses request to the messages of a chat.

Calls of one message are separate items here; reasoning belongs to the message after it. Traces of hosted tools and
items of unknown types are dropped.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

import msgspec

from cortex.dialects import fields
from cortex.dialects.answered_calls import OpenCalls
from cortex.dialects.responses.sealed import COMPACTIONS, summary_of, unseal
from cortex.dialects.responses.tools import OfferedTools
from cortex.wire.errors import InvalidRequestError, ToolCallNotFoundError, UnsupportedParameterError
from cortex.wire.request import MediaPart, Message, Part, Role, TextPart, ToolCall

T = TypeVar("T")


class _Content(msgspec.Struct):
    """A content part of a message or of a tool's output: text, a refusal, an image, or an unsupported one."""

    type: Literal[
        "input_text",
        "output_text",
        "text",
        "summary_text",
        "reasoning_text",
        "refusal",
        "input_image",
        "input_file",
        "input_audio",
        "output_audio",
        "computer_screenshot",
    ]
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    file_id: str | None = None
    detail: str | None = None


class _Kind(msgspec.Struct):
    type: str = "message"
    call_id: object = None


class Item(msgspec.Struct):
    """An input item of any type; :func:`messages_of` checks the members that a type requires."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[_Content] | msgspec.UnsetType | None = msgspec.UNSET
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    summary: list[_Content] | None = None
    encrypted_content: str | None = None
    output: str | list[_Content] | None = None


_MEDIA = {"input_file": "file", "input_audio": "audio", "output_audio": "audio", "computer_screenshot": "image"}
_ITEM_DECODER = msgspec.json.Decoder(Item)
_KIND_DECODER = msgspec.json.Decoder(_Kind)
_READ = frozenset(
    {
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "reasoning",
        *COMPACTIONS,
    }
)


def messages_of(items: Sequence[msgspec.Raw], tools: OfferedTools) -> Iterator[Message]:
    """Yield the messages of ``input``.

    Raises:
        InvalidRequestError: an item lacks a member that its type requires.
        ToolCallNotFoundError: an output answers no call before it.
        UnsupportedParameterError: an item refers to a stored one.
    """
    calls = OpenCalls()
    thoughts: list[str] = []  # of the assistant's next message
    answer: Message | None = None  # the assistant's, while calls may be added
    tool_calls: list[ToolCall] = []  # its calls
    traces: dict[str, ToolCall] = {}  # calls of tools that the request does not have, without an output
    for index, raw in enumerate(items):
        where = f"input[{index}]"
        item = _item(raw, where)
        match item.type:
            case "message":
                message = _message(item, where)
            case "function_call" | "custom_tool_call":
                call = _call(item, tools, where)
                calls.add(call.id)
                if answer is not None and not thoughts:
                    tool_calls.append(call)
                    continue
                message = Message(Role.ASSISTANT, "", (call,))
            case "function_call_output" | "custom_tool_call_output":
                call_id = _needed(item.call_id, where, "call_id")
                if item.output is None:
                    raise _missing(where, "output")
                if not calls.answer(call_id):
                    raise _unanswerable(item.type, call_id, calls.has_call(call_id))
                if (trace := traces.pop(call_id, None)) is not None:
                    answer = answer or Message(Role.ASSISTANT, "")
                    tool_calls.append(trace)
                message = Message(Role.TOOL, _content(item.output, f"{where}.output"), tool_call_id=call_id)
            case "reasoning":
                if thought := _thought(item):
                    thoughts.append(thought)
                continue
            case kind if kind in COMPACTIONS:
                message = Message(Role.ASSISTANT, summary_of(item.encrypted_content, where))
            case "item_reference":
                raise UnsupportedParameterError(
                    "Unsupported parameter: an 'item_reference' is resolved by the gateway.", param=where
                )
            case _:  # a trace of a hosted tool
                if item.call_id is not None:  # of a tool that the client runs, as a local shell, if an output follows
                    calls.add(item.call_id)
                    traces[item.call_id] = ToolCall(item.call_id, item.type.removesuffix("_call"), "{}")
                continue
        if answer is not None:
            yield msgspec.structs.replace(answer, tool_calls=tuple(tool_calls))
        answer, tool_calls = None, []
        if message.role is Role.ASSISTANT:
            tool_calls = [*message.tool_calls]
            answer = msgspec.structs.replace(message, reasoning="".join(thoughts) or None)
            thoughts = []
        else:
            yield message
    if answer is not None:
        yield msgspec.structs.replace(answer, tool_calls=tuple(tool_calls))


def _item(raw: msgspec.Raw, where: str) -> Item:
    """Return an item; of an unknown type, only the type."""
    try:
        found = _KIND_DECODER.decode(raw)
        if found.type in _READ:
            return _ITEM_DECODER.decode(raw)
        is_call = found.type.endswith("_call") and isinstance(found.call_id, str)
        return Item(found.type, call_id=str(found.call_id) if is_call else None)
    except msgspec.ValidationError as error:
        raise fields.invalid(error, where) from None


def _message(item: Item, where: str) -> Message:
    role = _needed(item.role, where, "role")
    if item.content is msgspec.UNSET:
        raise _missing(where, "content")
    assert not isinstance(item.content, msgspec.UnsetType)
    return Message(Role.SYSTEM if role == "developer" else Role(role), _content(item.content, f"{where}.content"))


def _call(item: Item, tools: OfferedTools, where: str) -> ToolCall:
    call_id, name = _needed(item.call_id, where, "call_id"), _needed(item.name, where, "name")
    arguments = item.arguments
    if arguments is None and item.type == "function_call":
        arguments = "{}"
    elif arguments is None:
        arguments = msgspec.json.encode({"input": item.input or ""}).decode()
    return ToolCall(call_id, tools.known_as(name, item.namespace), arguments)


def _unanswerable(kind: str, call_id: str, is_second: bool) -> ToolCallNotFoundError:
    """Return the refusal of an output, in OpenAI's words if it answers no call."""
    what = kind.replace("_", " ")
    if is_second:
        return ToolCallNotFoundError(f"The {what} with call_id {call_id} is a second one for its call.", param="input")
    return ToolCallNotFoundError(f"No tool call found for {what} with call_id {call_id}.", param="input")


def _thought(item: Item) -> str:
    """Return the text of a reasoning item: its content, its summary, or its sealed text."""
    for parts in (item.content, item.summary):
        if isinstance(parts, list) and parts:
            return "".join(part.text or "" for part in parts)
    return unseal(item.encrypted_content or "") or ""


def _needed(value: T | None, where: str, name: str) -> T:
    if value is None:
        raise _missing(where, name)
    return value


def _missing(where: str, name: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid '{where}': '{name}' is missing.", param=f"{where}.{name}")


def _content(content: str | list[_Content] | None, where: str) -> str | tuple[Part, ...]:
    if content is None or isinstance(content, str):
        return content or ""
    parts: list[Part] = []
    for number, part in enumerate(content):
        if part.type == "input_image":
            param = f"{where}[{number}].image_url"
            if part.image_url is not None:
                parts.append(fields.image(part.image_url, part.detail, param))
            elif part.file_id is not None:
                parts.append(MediaPart("image", f"{where}[{number}].file_id"))
            else:
                raise InvalidRequestError(f"Invalid '{param}': an image needs an address.", param=param)
        elif part.type in _MEDIA:
            parts.append(MediaPart(_MEDIA[part.type], f"{where}[{number}]"))
        else:
            parts.append(TextPart(part.text or part.refusal or ""))
    return fields.collapse(parts)

"""Messages in the shape chat templates expect, whatever a client's history holds.

A client sends its whole history with every request: a message that a template cannot take would be refused for the
rest of the conversation. So a call whose arguments were cut, are null or no object becomes an object, a result gets
the name of the call it answers, and system messages of any number and place become one.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from cortex.wire.errors import UnsupportedParameterError
from cortex.wire.request import ImagePart, MediaPart, Message, Role, TextPart, Tool

MAX_ARGUMENTS_DEPTH: Final = 64
ARGUMENTS_AS_TEXT: Final = "arguments"
"""The name under which a template sees arguments that are no object."""
_ALPHABET: Final = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def message_text(message: Message) -> str:
    """Return the text of a message."""
    if isinstance(message.content, str):
        return message.content
    texts = []
    for part in message.content:
        match part:
            case TextPart(text):
                texts.append(text)
            case ImagePart() | MediaPart():  # taken out before, where the model cannot see
                raise UnsupportedParameterError("This model takes no images.", param="messages")
    return "".join(texts)


def arguments_object(arguments: str) -> dict[str, Any]:
    """Return a call's arguments as an object: no text is an empty one, and what is no object is a part of one."""
    if not arguments.strip():
        return {}
    value: Any = arguments
    for _ in range(2):  # some clients write the object as a string, as the OpenAI dialect has it, once more
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            break
        if not isinstance(value, str):
            break
    if value is None:
        return {}
    if not isinstance(value, dict) or is_deeper(value, MAX_ARGUMENTS_DEPTH):
        return {ARGUMENTS_AS_TEXT: arguments if isinstance(value, dict | list) else value}
    return value


def is_deeper(value: object, levels: int) -> bool:
    """Return whether a value of JSON is nested deeper than ``levels``; walks it without recursion."""
    level = [value]
    for _ in range(levels):
        level = [
            child
            for inner in level
            for child in (inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ())
        ]
        if not level:
            return False
    return True


def with_results_named(messages: Sequence[Message]) -> list[Message]:
    """Give each result of a tool the name of the call it answers, which some templates write."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    return [
        msgspec.structs.replace(message, name=names[message.tool_call_id])
        if message.role is Role.TOOL and message.name is None and message.tool_call_id in names
        else message
        for message in messages
    ]


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """Give calls ids of nine letters and digits, as Mistral's templates insist on."""
    return [
        msgspec.structs.replace(
            message,
            tool_calls=tuple(msgspec.structs.replace(call, id=_short(call.id)) for call in message.tool_calls),
            tool_call_id=None if message.tool_call_id is None else _short(message.tool_call_id),
        )
        for message in messages
    ]


def _short(call_id: str) -> str:
    if len(call_id) == 9 and call_id.isalnum() and call_id.isascii():
        return call_id
    number = int.from_bytes(hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).digest()[:8])
    return "".join(_ALPHABET[number // 62**place % 62] for place in range(9))


def one_system_message(messages: Sequence[Message]) -> list[Message]:
    """Merge all system messages into one at the front; most templates refuse any other."""
    system = [message_text(message) for message in messages if message.role is Role.SYSTEM]
    others = [message for message in messages if message.role is not Role.SYSTEM]
    merged = "\n\n".join(text for text in system if text)
    return [Message(Role.SYSTEM, merged), *others] if merged else others


def merge_adjacent(messages: Sequence[Message]) -> list[Message]:
    """Join consecutive messages of the same role; tool results stay apart, as each answers its own call."""
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else None
        if before is None or before.role is not message.role or message.role is Role.TOOL:
            joined.append(message)
            continue
        joined[-1] = Message(
            message.role,
            "\n\n".join(text for text in (message_text(before), message_text(message)) if text),
            (*before.tool_calls, *message.tool_calls),
            name=before.name,
            reasoning="\n\n".join(text for text in (before.reasoning, message.reasoning) if text) or None,
        )
    return joined


def template_message(message: Message) -> dict[str, Any]:
    """Return a message in the form that templates take."""
    seen: dict[str, Any] = {"role": str(message.role), "content": message_text(message)}
    if message.name is not None:
        seen["name"] = message.name
    if message.reasoning:
        # gpt-oss' templates read `thinking`.
        seen["reasoning_content"] = seen["thinking"] = message.reasoning
    if message.tool_calls:
        seen["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": arguments_object(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        seen["tool_call_id"] = message.tool_call_id
    return seen


def tool_schema(tool: Tool) -> dict[str, Any]:
    """Return a tool in the form that templates take."""
    function: Mapping[str, Any] = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
    }
    return {"type": "function", "function": function}


def with_tools_as_text(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Put tools, calls and results into plain messages, for a template that has no place for them."""
    written: list[Message] = []
    if tools:
        listed = "\n".join(_json(tool_schema(tool)) for tool in tools)
        written.append(
            Message(
                Role.SYSTEM,
                "You can call functions. These are their signatures, one JSON object a line:\n"
                f"<tools>\n{listed}\n</tools>\n\n"
                "To call one, answer with a JSON object of its name and its arguments within these tags:\n"
                '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>',
            )
        )
    for message in messages:
        if message.tool_calls:
            bodies = [{"name": c.name, "arguments": arguments_object(c.arguments)} for c in message.tool_calls]
            calls = "\n".join(f"<tool_call>\n{_json(body)}\n</tool_call>" for body in bodies)
            text = message_text(message)
            written.append(Message(Role.ASSISTANT, f"{text}\n{calls}" if text else calls))
        elif message.role is Role.TOOL:
            written.append(Message(Role.USER, f"<tool_response>\n{message_text(message)}\n</tool_response>"))
        else:
            written.append(message)
    return written


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)

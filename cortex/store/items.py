"""The items of a stored response, as JSON: the stored form of an input, and the input of a whole chain.

Pure. Items are stored as the client sent them, with the id, type and content list that a listing needs.
"""

import os
from collections.abc import Iterable
from typing import Any

import msgspec
import orjson

from cortex.wire.errors import InvalidTypeError

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])


class _Item(msgspec.Struct):
    id: str | None = None


class _Answer(msgspec.Struct):
    output: list[_Item] = []


_ITEM = msgspec.json.Decoder(_Item)
_ANSWER = msgspec.json.Decoder(_Answer)

ID_BYTES = 12

_ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


def input_items(body: bytes) -> list[dict[str, Any]]:
    """Return the input of a request as items.

    Raises:
        InvalidTypeError: it is neither a text nor a list of objects.
    """
    given = orjson.loads(body).get("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise InvalidTypeError("Invalid value for 'input': expected a string or a list of objects.", param="input")
    return given


def listed(items: list[dict[str, Any]]) -> bytes:
    """Return items in the form of a listing: each with a type, an id, and a list of content parts."""
    drawn = os.urandom(ID_BYTES * len(items)).hex()
    size = 2 * ID_BYTES
    return orjson.dumps([_listed(item, drawn[at * size : (at + 1) * size]) for at, item in enumerate(items)])


def _listed(item: dict[str, Any], drawn: str) -> dict[str, Any]:
    kind = item.get("type") or "message"
    if not isinstance(kind, str):
        kind = "item"  # refused by its reader
    found = {**item, "type": kind}
    if not isinstance(found.get("id"), str):
        found["id"] = f"{_ID_PREFIXES.get(str(kind), 'item')}_{drawn}"
    if kind == "message":
        found.setdefault("status", "completed")
        if isinstance(found.get("content"), str):
            part: dict[str, Any] = {"type": "input_text", "text": found["content"]}
            if found.get("role") == "assistant":
                part = {"type": "output_text", "text": found["content"], "annotations": []}
            found["content"] = [part]
    elif kind != "reasoning" and kind in _ID_PREFIXES:
        found.setdefault("status", "completed")
    return found


def output_items(response: bytes) -> list[msgspec.Raw]:
    """Return the output items of a response; none if it has no ``output``."""
    return _ITEMS.decode(_FIELDS.decode(response).get("output", b"[]"))


def check_output(response: bytes) -> None:
    """Raise ``MsgspecError``, ``ValueError`` or ``RecursionError`` for a response whose output is no list of items."""
    _ANSWER.decode(response)


def id_of(item: msgspec.Raw) -> str:
    """Return the id of a stored item, or an empty string."""
    try:
        return _ITEM.decode(item).id or ""
    except msgspec.MsgspecError:
        return ""


def kept_items(listing: bytes) -> list[msgspec.Raw]:
    """Return the items of a listing that :func:`listed` wrote."""
    return _ITEMS.decode(listing)


def size_of(items: Iterable[msgspec.Raw]) -> int:
    """Return the size of items in bytes."""
    return sum(memoryview(item).nbytes for item in items)


def with_input(body: bytes, items: list[msgspec.Raw]) -> bytes:
    """Return a request body with ``items`` as its input, which continues no response."""
    given = _FIELDS.decode(body)
    given.pop("previous_response_id", None)
    given["input"] = msgspec.Raw(msgspec.json.encode(items))
    return msgspec.json.encode(given)

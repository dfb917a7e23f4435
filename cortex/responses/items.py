"""Items as JSON: their stored form, and the input of a whole chain.

Pure. Items are stored as the client sent them, with the id, type and content list that a listing needs. Values below an
item's own members are never parsed; a chain is joined from the bytes of its records.
"""

import os
from collections.abc import Iterable

import msgspec

from cortex.wire.errors import InvalidTypeError

Item = dict[str, msgspec.Raw]

FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
"""Decoder of an object's own members."""

_INPUT = msgspec.json.Decoder(list[Item])
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])
_STRING = msgspec.json.Decoder(str)


class _Id(msgspec.Struct):
    id: str | None = None


_ID = msgspec.json.Decoder(_Id)
_IDS = msgspec.json.Decoder(list[_Id])

_INPUT_TEXT = b'[{"type":"input_text","text":%b}]'
_OUTPUT_TEXT = b'[{"type":"output_text","text":%b,"annotations":[]}]'

ID_BYTES = 12

_ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


def input_items(given: msgspec.Raw | None) -> list[Item]:
    """Return the input of a request as items.

    Raises:
        InvalidTypeError: it is neither a text nor a list of objects.
    """
    if given is not None and is_text(given):
        return [{"role": msgspec.Raw(b'"user"'), "content": given}]
    try:
        return _INPUT.decode(given or b"null")
    except (msgspec.DecodeError, RecursionError):
        raise InvalidTypeError(
            "Invalid value for 'input': expected a string or a list of objects.", param="input"
        ) from None


def is_text(value: msgspec.Raw) -> bool:
    """Return whether a value is a string."""
    return memoryview(value)[0] == ord('"')


def text_of(value: msgspec.Raw | None) -> str | None:
    """Return a string; ``None`` for another value."""
    try:
        return _STRING.decode(value) if value is not None and is_text(value) else None
    except msgspec.DecodeError:  # half a surrogate pair
        return None


def listed(items: list[Item]) -> bytes:
    """Return items in the form of a listing: each with a type, an id, and a list of content parts."""
    drawn = os.urandom(ID_BYTES * len(items)).hex()
    size = 2 * ID_BYTES
    return msgspec.json.encode([_listed(item, drawn[at * size : (at + 1) * size]) for at, item in enumerate(items)])


def _listed(item: Item, drawn: str) -> dict[str, object]:
    given = item.get("type")
    is_message = given is None or bytes(given) in (b'""', b"null")
    kind = "message" if is_message else text_of(given) or "item"  # another value is refused by its reader
    found: dict[str, object] = {**item, "type": kind}
    if text_of(item.get("id")) is None:
        found["id"] = f"{_ID_PREFIXES.get(kind, 'item')}_{drawn}"
    if kind == "message":
        found.setdefault("status", "completed")
        content = item.get("content")
        if content is not None and is_text(content):
            part = _OUTPUT_TEXT if text_of(item.get("role")) == "assistant" else _INPUT_TEXT
            found["content"] = msgspec.Raw(part % bytes(content))
    elif kind != "reasoning" and kind in _ID_PREFIXES:
        found.setdefault("status", "completed")
    return found


def joined(arrays: Iterable[bytes]) -> bytes:
    """Return one JSON array with the items of several."""
    return b"[%b]" % b",".join(items for array in arrays if (items := array[1:-1].strip()))


def split(array: bytes) -> list[msgspec.Raw]:
    """Return the items of a JSON array. Raises ``MsgspecError``."""
    return _ITEMS.decode(array)


def check(array: msgspec.Raw) -> None:
    """Raise ``MsgspecError``, ``ValueError`` or ``RecursionError`` for a value that is no list of items."""
    _IDS.decode(array)


def id_of(item: msgspec.Raw) -> str:
    """Return the id of a stored item, or an empty string."""
    try:
        return _ID.decode(item).id or ""
    except msgspec.MsgspecError:
        return ""
